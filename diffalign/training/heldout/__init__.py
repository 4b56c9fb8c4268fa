"""Pairs that a run does not train on: measuring them, ending a run by them, and finding doubtful labels."""
