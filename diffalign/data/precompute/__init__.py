"""Filling the caches, shard by shard, by any number of processes."""
