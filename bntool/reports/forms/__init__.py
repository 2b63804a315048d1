"""Reports in the forms that programs read: a module for each."""
