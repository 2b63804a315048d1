"""The graph that a file of ONNX, Keras or Caffe holds."""
