"""Commands that take the config of a run."""
