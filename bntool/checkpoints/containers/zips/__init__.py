"""Zip archives: reading one strictly, copying it record by record."""
