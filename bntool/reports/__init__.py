"""What happened, as data; one file per verb, and one per rendering."""
