"""Protocol Buffers without a schema."""
