"""Noise schedule, DDIM in both directions, the calls of the networks, and random numbers. Needs torch alone."""
