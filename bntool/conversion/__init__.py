"""To another file format, or between BatchNorm and FrozenBatchNorm2d."""
