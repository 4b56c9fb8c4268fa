"""What a run writes to continue from, and its final weights."""
