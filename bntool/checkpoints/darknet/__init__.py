"""Weights of Darknet, whose layers a ``.cfg`` beside them says."""
