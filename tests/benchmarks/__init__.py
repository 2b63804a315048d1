"""Measurements against peers in the same run; they print ratios and assert nothing about time."""
