"""Mistakes of training and saving, really made on small networks: what `inspect` says of the files."""
