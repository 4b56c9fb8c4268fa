"""Measurements that are too long or too machine-dependent for the tests. Not part of the installed package."""
