"""A step-aware preference model (SPO, arXiv 2406.04314): the network, the scorer and its training.

`diffalign.rewards` finds the scorers `step-aware` and `world-step-aware`, and `training.run` what trains the model, by
their dotted names; nothing else in the core needs this package.
"""
