"""What a notebook measures, and the sweep that runs notebooks under every binding."""
