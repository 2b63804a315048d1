"""Files that Flax writes with ``flax.serialization``."""
