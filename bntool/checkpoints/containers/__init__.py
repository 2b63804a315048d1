"""What files are made of: zips, pickles, protobufs, HDF5, sorted tables. Knows nothing of models."""
