"""Checkpoints that MindSpore writes."""
