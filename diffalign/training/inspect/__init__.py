"""Inspection of a run before it starts: the dry run, calibration, gradients, memory, units of scores."""
