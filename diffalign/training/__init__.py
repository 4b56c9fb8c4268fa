"""A run: built from a config, stepped, watched, written and resumed."""
