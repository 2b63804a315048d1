"""Pictures in tables: numbers of channels counted on an axis that rows share, as data, and drawn in one line."""
