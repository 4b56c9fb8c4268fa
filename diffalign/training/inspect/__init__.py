"""What is said of a run before or beside it: the dry run, calibration, gradients, memory."""
