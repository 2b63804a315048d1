"""Caffe's nets with their blobs."""
