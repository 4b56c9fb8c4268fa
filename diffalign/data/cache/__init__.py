"""Results that are computed once and read at every visit: latents, embeddings, trajectories, the reference's errors."""
