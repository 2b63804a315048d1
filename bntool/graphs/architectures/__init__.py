"""The graph of a known architecture, recognised by the names and shapes of its tensors."""
