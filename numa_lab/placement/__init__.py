"""Where threads run and pages lie: put them on a node, see where they are, prove it, and give everything back."""
