"""The archives and HDF5 files of Keras."""
