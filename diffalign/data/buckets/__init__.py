"""Pairs of several shapes: the sizes they come to, and an order whose micro-batches have one size each."""
