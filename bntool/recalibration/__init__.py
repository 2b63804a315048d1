"""Recomputing running statistics from data."""
