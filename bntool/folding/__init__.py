"""Absorbing scale and shift of BatchNorms into the layers around them."""
