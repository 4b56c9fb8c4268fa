"""Filling folders of shards: settings that all precomputing shares, and results of networks beside a latent cache.

A shard of such results (trajectories, the reference's errors) records how many images went through the networks to make
it. A run counts that for every shard that it uses, whether it made it, found it, or made it before it was killed:
`unet_forwards` is then the same for all of these.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from diffalign.data.cache.latents import PairCache
from diffalign.data.cache.shards import (
    SHARD_BYTES,
    fill,
    manifest_text,
    read_content,
    require_room,
    sweep,
    write_cache_manifest,
)
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.row import DataError
from diffalign.data.sampler import ALONE, Processes

log = logging.getLogger(__name__)

FORWARDS = "forwards"  # name of the tensor that holds the count


class Counts(Protocol):
    """An object that counts the images that go through the networks; `models.Networks` does."""

    image_forwards: int


@dataclass(frozen=True)
class Work:
    """How a folder of shards is filled."""

    batch_size: int = 4  # pairs in one call of a network
    num_workers: int = 0  # processes that read images
    shard_bytes: int = SHARD_BYTES  # at most, where a shard has several pairs
    processes: Processes = ALONE  # this process makes its share of the shards
    counts: Counts | None = None  # gets the forwards of the shards, also of those that are found


@dataclass(frozen=True)
class Recording:
    """A folder of results beside a latent cache, as its manifest describes it."""

    folder: Path
    pairs: int
    pairs_per_shard: int
    hashed: bool  # whether its shards have hashes

    def parts(self) -> list[range]:
        """The pairs of each shard."""
        size = self.pairs_per_shard
        return [range(first, min(first + size, self.pairs)) for first in range(0, self.pairs, size)]

    def require_room(self, names: Sequence[str], pair_bytes: int, what: str, remedy: str) -> None:
        """Raises NoSpaceError when the disk has no room for the shards that are missing."""
        missing = sum(not (self.folder / name).exists() for name in names)
        require_room(self.folder, missing * min(self.pairs_per_shard, self.pairs) * pair_bytes, what, remedy)

    def fill(self, names: list[str], make: Callable[[str], dict[str, Tensor]], work: Work, title: str) -> None:
        """Makes this process's share of the shards, as far as they are not there.

        Call it again after an interruption: finished shards are used, and damaged ones are made again.
        """
        counts = work.counts

        def counted(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
            if counts is None:
                return make(name), {}
            before = counts.image_forwards
            return {**make(name), FORWARDS: torch.tensor([counts.image_forwards - before])}, {}

        own = work.processes.share(names)
        fill(self.folder, own, self.hashed, title, counted, lambda name: _count_found(self.folder / name, counts))


def open_recording(cache: PairCache, kind: str, key: Mapping[str, Any], pairs_per_shard: int) -> Recording:
    """The folder of results that belong to `key`, begun if there is none yet; one that is there keeps its shard size.

    Raises DataError where the folder has results of something else, or a damaged manifest.
    """
    text = json.dumps(key, sort_keys=True)
    folder = cache.folder / kind / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    if read_content(folder) is None:
        plan = {"pairs_per_shard": pairs_per_shard, "pairs": cache.pairs}
        write_cache_manifest(folder, manifest_text({"key": dict(key), "plan": plan}))
    found = read_content(folder)
    if found is None or found[0].get("key") != json.loads(json.dumps(key)) or "plan" not in found[0]:
        raise DataError(f"{folder} contains a recording of something else; delete it to have it made again")
    sweep(folder)
    return Recording(folder, cache.pairs, int(found[0]["plan"]["pairs_per_shard"]), found[1])


def cache_of(source: OfflinePairs) -> PairCache:
    """The latent cache that a source reads. Raises DataError where it reads something else."""
    if not isinstance(source.content, PairCache):
        raise DataError("results of networks are stored beside a latent cache: open the pairs with `open_cache`")
    return source.content


def not_a_number(what: str, source: OfflinePairs, index: int) -> DataError:
    """The error for a result that must not be stored."""
    return DataError(
        f"the {what} of pair {source.table.ids[index]} ({source.table.where(index)}) is not finite and "
        "is not stored. Remove that row if it is the only one; otherwise set training.mixed_precision "
        "to bf16 or no, or use another base"
    )


def _count_found(file: Path, counts: Counts | None) -> None:
    """Adds the forwards that a shard took to the run's count; a shard of an older version does not record them."""
    if counts is None:
        return
    with safe_open(file, "pt") as shard:
        if FORWARDS in shard.keys():  # noqa: SIM118
            counts.image_forwards += int(shard.get_tensor(FORWARDS))
        else:
            log.warning(
                "%s is from an older version and does not record its cost: unet_forwards does not include it", file
            )
