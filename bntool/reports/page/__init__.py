"""A result as one page of HTML that needs no network, and as the parts of it that a notebook shows."""
