"""PPD (arXiv 2501.06655): one network for many users, conditioned by user attention."""
