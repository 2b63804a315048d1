"""Keeping statistics, weight and bias from changing while a model trains on."""
