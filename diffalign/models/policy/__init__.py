"""The policy and what it is compared with, as the engine calls them."""
