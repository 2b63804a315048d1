"""The graph of a live model, seen while one forward runs."""
