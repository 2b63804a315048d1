"""Thin adapters for training frameworks; each module imports the framework that it is for."""
