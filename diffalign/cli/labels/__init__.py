"""Commands for labels by scorers and by eye, and for the votes."""
