"""The command line: one thin file per command. The only room that prints."""
