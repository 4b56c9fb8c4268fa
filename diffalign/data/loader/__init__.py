"""Pairs as micro-batches: one visit of a pair, and the endless stream of them."""
