"""Channel transforms: every channel of every tensor may be stored as a (x + b), and BatchNorms go where that holds."""
