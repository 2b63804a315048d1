"""``--data``: a spec becomes batches. Runs the user's code."""
