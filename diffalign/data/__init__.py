"""Preference pairs, from files to micro-batches."""
