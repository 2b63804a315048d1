"""What a user installs, tried in environments of its own; too slow for the suite, run by ``make wheel``."""
