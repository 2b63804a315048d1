"""Files on other machines, read by position like those that lie here; imported when an address is given."""
