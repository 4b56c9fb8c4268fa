"""Files, paths, locks and weight files: what everything above reads and writes with."""
