"""Released checkpoints, what their papers report, and our figures beside those."""
