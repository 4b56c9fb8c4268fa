"""Trajectories of a frozen network, stored beside the latent cache: inverted once, read in every epoch and run.
`precompute/trajectories.py` makes them.

    CACHE/trajectories/HASH/manifest.json                      the key that HASH is of, and pairs per shard
    CACHE/trajectories/HASH/trajectory-00000.safetensors       x "pair variant side level c h w" of consecutive pairs

Latents alone are stored, in float32 whatever the dtype of the latent cache: the noise of a transition is a small
difference of two of them. The clean image of a trajectory is one draw from its moments, which no run's seed enters, so
it is the same in every visit and every run.

Left out: dropped prompts, which would need a second trajectory of every pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffalign.data.cache.latents import PairCache
from diffalign.data.cache.shards import OpenShards
from diffalign.data.loader.loaded import Loaded
from diffalign.types import Transitions

ALL = slice(None)


class Trajectories:
    """Encoded pairs with the transitions that a visit asks at; otherwise as the latent cache has them."""

    def __init__(
        self, cache: PairCache, folder: Path, pairs_per_shard: int, levels: Tensor, visited: Callable[[Tensor], Tensor]
    ) -> None:
        """`levels` int64 [level] are the timesteps of the stored latents; `visited` as in `Recordable`."""
        self.cache, self.folder, self.pairs_per_shard = cache, folder, pairs_per_shard
        self.levels, self.visited = levels, visited
        self._shards, self.shapes = OpenShards(folder), cache.shapes

    def load(self, index: int, key: int, draw: int, prompt: str | None) -> Loaded:
        """One visit of a pair as `PairCache.load` has it, with its transitions, whose clean end its latents are.

        Raises ImageError for a pair that could not be read when the cache was made.
        """
        loaded = self.cache.load(index, key, draw, prompt)
        number, row = divmod(index, self.pairs_per_shard)
        shard = self._shards[shard_name(number)]
        variant = draw % int(self.cache.key.variants or 1)
        points = self.visited(torch.tensor([key], dtype=torch.int64))[0]
        if len(points) == len(self.levels) - 1:
            levels = shard.read("x", row, variant)
            clean, noisy = levels[:, :-1], levels[:, 1:]
        else:
            ends = torch.stack([shard.read("x", row, variant, ALL, slice(k, k + 2)) for k in points.tolist()], dim=1)
            clean, noisy = ends[:, :, 0], ends[:, :, 1]
        t, t_prev = self.levels[points + 1], self.levels[points]
        moves = Transitions(noisy[:, None], clean[:, None], t[None], t_prev[None])
        return replace(loaded, latents=shard.read("x", row, variant, ALL, slice(1)), transitions=moves)

    def flip(self, name: str, key: int, draw: int) -> bool:
        """As the latent cache has it."""
        return self.cache.flip(name, key, draw)


def shard_name(number: int) -> str:
    """The file of the shard with this number."""
    return f"trajectory-{number:05d}.safetensors"
