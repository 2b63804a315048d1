"""Pickles as data: reading one into inert nodes and writing nodes back, without importing what they name."""
