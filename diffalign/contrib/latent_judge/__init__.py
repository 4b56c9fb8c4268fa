"""A judge of noisy latents (LPO's latent reward model, arXiv 2502.01051): the network, the scorer and its training.

`diffalign.rewards` finds the scorers `latent-judge` and `world-latent-judge`, and `training.run` what trains the judge,
by their dotted names; nothing else in the core needs this package.
"""
