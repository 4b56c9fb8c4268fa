"""The reference's errors, stored beside the latent cache: computed once for each pair and draw, read at every visit.
`precompute/reference_errors.py` makes them.

    CACHE/reference_errors/HASH/manifest.json                            the key that HASH is of, and pairs per shard
    CACHE/reference_errors/HASH/errors-DRAW-00000.safetensors            e "pair side [point]" of consecutive pairs

An error is a number: a pair with one point takes 8 bytes a draw. It belongs to the pair, to one of its `draws` (latent,
t, ε, an emptied prompt), to the network and to the kernels that computed it; all of that is in the key, so what was
made under other settings is never found. A pair that could not be read has NaN here and is never visited.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffalign.data.cache.latents import PairCache
from diffalign.data.cache.shards import OpenShards
from diffalign.data.loader.loaded import Loaded


class ReferenceErrors:
    """Encoded pairs with the reference's errors at the visit; otherwise as the latent cache has them."""

    def __init__(self, cache: PairCache, folder: Path, pairs_per_shard: int) -> None:
        """`folder` is complete, and the visits of whoever reads it repeat after as many draws as it has."""
        self.cache, self.folder, self.pairs_per_shard = cache, folder, pairs_per_shard
        self._shards, self.shapes = OpenShards(folder), cache.shapes

    def load(self, index: int, key: int, draw: int, prompt: str | None) -> Loaded:
        """One visit of a pair as `PairCache.load` has it, with the reference's errors."""
        number, row = divmod(index, self.pairs_per_shard)
        errors = self._shards[shard_name(draw, number)].read("e", slice(row, row + 1))  # "pair side [point]"
        return replace(self.cache.load(index, key, draw, prompt), reference=errors.transpose(0, 1))

    def flip(self, name: str, key: int, draw: int) -> bool:
        """Whether the images are mirrored at the visit."""
        return self.cache.flip(name, key, draw)


def shard_name(draw: int, number: int) -> str:
    """The file of one draw of the pairs of the shard with this number."""
    return f"errors-{draw:03d}-{number:05d}.safetensors"
