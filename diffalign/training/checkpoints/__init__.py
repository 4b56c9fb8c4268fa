"""What a run writes to go on from, and its final weights."""
