"""Statistics that eval mode itself sees: all batches advance through the model together, layer by layer."""
