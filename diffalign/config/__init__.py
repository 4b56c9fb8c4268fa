"""One YAML file is one run: its schema, loading, overrides and checks."""
