"""Training a step-aware preference model, a judge of half-made pictures."""
