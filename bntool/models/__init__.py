"""``--model``: a spec becomes a live module. Runs the user's code."""
