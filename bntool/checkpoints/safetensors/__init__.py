"""The safetensors format, and checkpoints split over several files."""
