"""What watches a run: health rules, recovery, validation pictures, signals."""
