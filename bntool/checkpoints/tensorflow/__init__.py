"""TensorFlow's checkpoints and the variables of SavedModel folders."""
