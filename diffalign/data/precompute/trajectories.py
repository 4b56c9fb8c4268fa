"""Precomputing trajectories: each pair of a latent cache once, shard by shard, by any number of processes and runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.data.cache.latents import PairCache
from diffalign.data.cache.shards import not_finite
from diffalign.data.cache.trajectories import shard_name
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.precompute.recording import Work, cache_of, not_a_number, open_recording
from diffalign.data.row import ImageError
from diffalign.engine.random import pair_key
from diffalign.types import PairBatch, cat

FOLDER = "trajectories"
ROOM = "free some, lower objective.steps (with more objective.substeps), or set data.cache_trajectories=false"
SEED = 0  # of the draw from the moments; no run's own, so that runs share trajectories


def trajectory_key(cache: PairCache, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the trajectories of a cache depend on: its images and prompts, and `facts` of network and inversion."""
    return {"format_version": 1, "encoded": asdict(cache.key), **facts}


def record_trajectories(
    source: OfflinePairs,
    key: Mapping[str, Any],
    record: Callable[[PairBatch], Tensor],
    levels: int,
    work: Work,
) -> tuple[Path, int]:
    """Fills the folder that belongs to `key` as far as it is not there; returns it with its pairs per shard.

    source: pairs of a latent cache. record: a batch -> "side pair level c h w" with `levels` levels.

    Raises NoSpaceError when the disk has no room for what is missing, DataError for a trajectory that is not finite.
    """
    cache = cache_of(source)
    shape, variants = cache.latent_shape, int(cache.key.variants or 1)
    pair_bytes = 4 * variants * 2 * levels * shape.numel()
    recording = open_recording(cache, FOLDER, key, max(1, work.shard_bytes // pair_bytes))
    pairs_of = {shard_name(number): pairs for number, pairs in enumerate(recording.parts())}
    recording.require_room(list(pairs_of), pair_bytes, "trajectories", ROOM)

    def make(name: str) -> dict[str, Tensor]:
        x = torch.zeros(len(pairs_of[name]), variants, 2, levels, *shape)
        for variant in range(variants):
            _record(source, pairs_of[name], variant, record, x[:, variant], work.batch_size)
        return {"x": x}

    recording.fill(list(pairs_of), make, work, "trajectories")
    return recording.folder, recording.pairs_per_shard


def _record(
    source: OfflinePairs,
    pairs: range,
    variant: int,
    record: Callable[[PairBatch], Tensor],
    out: Tensor,
    batch_size: int,
) -> None:
    """Writes the trajectories of the readable pairs of one shard into `out`, "pair side level c h w"."""
    table, cache = source.table, cache_of(source)
    for first in range(0, len(pairs), batch_size):
        rows, loaded = [], []
        for row in range(first, min(first + batch_size, len(pairs))):
            index = pairs[row]
            key = pair_key(SEED, table.ids[index], variant)
            try:
                loaded.append(cache.load(index, key, variant, table.prompts[index]))
            except ImageError:
                continue  # the latent cache names it, and no visit gets as far as its trajectory
            rows.append(row)
        if rows:
            made = record(source.assemble(cat(loaded))).transpose(0, 1).to("cpu", torch.float32)
            for place in not_finite(made)[:1]:
                raise not_a_number("trajectory", source, pairs[rows[place]])
            out[torch.tensor(rows)] = made
