"""ONNX models, with their tensors in the file or beside it."""
