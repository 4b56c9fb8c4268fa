"""Prompts to embeddings: long prompts in chunks, clip skip, and weights written into a prompt."""
