"""Scorers whose networks are released in the authors' own layout and are rebuilt here on transformers' classes."""
