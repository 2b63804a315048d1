"""Weights of Darknet, which the ``.cfg`` beside them names."""
