"""Noise schedule, DDIM in both directions, and the one place where networks are called. Needs torch alone."""
