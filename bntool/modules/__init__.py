"""Live torch modules: finding BatchNorms of every kind, borrowing a model and giving it back, applying plans."""
