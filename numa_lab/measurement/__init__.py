"""Times and what they prove: cases, the clock, rows of results, and honest comparison."""
