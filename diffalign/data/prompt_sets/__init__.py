"""Prompt sets of the papers, by name: where each is read from, how many prompts it has, and the hash of its text."""
