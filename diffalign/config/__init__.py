"""One YAML file is one run: its schema, how it is read, overridden and checked."""
