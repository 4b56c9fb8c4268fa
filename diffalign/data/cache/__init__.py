"""What is computed once and read at every visit: latents, embeddings, trajectories, errors of the reference."""
