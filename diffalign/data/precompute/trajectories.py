"""Making trajectories: each pair of an encode cache once, shard by shard, by any number of processes and runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffalign.data.cache.latents import PairCache
from diffalign.data.cache.recorded import Counts, agreed_plan, count_found, no_number, spent
from diffalign.data.cache.shards import SHARD_BYTES, in_own_order, not_finite, require_room, sweep, write_shard
from diffalign.data.cache.trajectories import shard_name
from diffalign.data.loader.dataset import Loaded
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.row import ImageError
from diffalign.data.sampler import ALONE, Processes
from diffalign.engine.random import pair_key
from diffalign.types import PairBatch

FOLDER = "trajectories"
ROOM = "free some, lower objective.steps (with more objective.substeps), or set data.cache_trajectories=false"
SEED = 0  # of the draw from the moments; no run's own, so that runs share trajectories


def trajectory_key(cache: PairCache, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the trajectories of a cache depend on: its images and prompts, and `facts` of network and inversion."""
    return {"format_version": 1, "encoded": asdict(cache.key), **facts}


def record_trajectories(
    source: OfflinePairs,
    cache: PairCache,
    key: Mapping[str, Any],
    record: Callable[[PairBatch], Tensor],
    levels: int,
    *,
    batch_size: int = 4,
    shard_bytes: int = SHARD_BYTES,
    processes: Processes = ALONE,
    counts: Counts | None = None,
) -> tuple[Path, int]:
    """Fills the folder that belongs to `key` as far as it is not there; returns it with its pairs per shard.

    source: pairs of `cache`, for their conditioning. record: a batch -> "side pair level c h w" with `levels` levels.
    This process makes its share of the shards. Call it again after an interruption: finished shards are kept, and
    damaged ones are made again. `counts` gets the forwards of the shards that are found as well.

    Raises NoSpaceError when the disk has no room for what is missing, DataError for a trajectory that is not finite.
    """
    text = json.dumps(key, sort_keys=True)
    folder = cache.folder / FOLDER / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    shape = cache.latent_shape
    variants = int(cache.key.variants or 1)
    pair_bytes = 4 * variants * 2 * levels * shape.numel()
    begun = {"pairs_per_shard": max(1, shard_bytes // pair_bytes), "pairs": cache.pairs}
    plan, hashed = agreed_plan(folder, key, begun)
    per_shard = int(plan["pairs_per_shard"])
    sweep(folder)
    names = [shard_name(i) for i in range(-(-cache.pairs // per_shard))]
    missing_bytes = sum(not (folder / name).exists() for name in names) * min(per_shard, cache.pairs) * pair_bytes
    require_room(folder, missing_bytes, "trajectories", ROOM)
    own = {names[i]: _pairs_of(i, per_shard, cache.pairs) for i in processes.share(list(range(len(names))))}
    with tqdm(total=sum(map(len, own.values())), desc="trajectories", unit=" pairs", delay=3.0, mininterval=1.0) as bar:
        for name, missing in in_own_order(folder, list(own), hashed):
            if not missing:
                count_found(folder / name, counts)
            else:
                before = 0 if counts is None else counts.image_forwards
                x = torch.zeros(len(own[name]), variants, 2, levels, *shape)
                for variant in range(variants):
                    _record_shard(source, cache, own[name], variant, record, x[:, variant], batch_size)
                write_shard(folder, name, {"x": x, **spent(before, counts)}, {})
            bar.update(len(own[name]))
    return folder, per_shard


def _record_shard(
    source: OfflinePairs,
    cache: PairCache,
    indices: range,
    variant: int,
    record: Callable[[PairBatch], Tensor],
    out: Tensor,
    batch_size: int,
) -> None:
    """Writes the trajectories of the readable pairs of one shard into `out`, "pair side level c h w"."""
    for first in range(0, len(indices), batch_size):
        rows, loaded = [], []
        for row in range(first, min(first + batch_size, len(indices))):
            index = indices[row]
            key = pair_key(SEED, source.table.ids[index], variant)
            try:
                tensors = cache.load(index, key, variant, source.table.prompts[index])
            except ImageError:
                continue  # the encode cache names it, and no visit gets as far as its trajectory
            rows.append(row)
            loaded.append((key, tensors))
        if rows:
            made = record(source.assemble(_together(loaded))).transpose(0, 1).to("cpu", torch.float32)
            for place in not_finite(made)[:1]:
                raise no_number("trajectory", source, indices[rows[place]])
            out[torch.tensor(rows)] = made


def _together(loaded: list[tuple[int, dict[str, Tensor]]]) -> Loaded:
    return Loaded(
        keys=torch.tensor([key for key, _ in loaded], dtype=torch.int64),
        ids=("",) * len(loaded),
        prompts=("",) * len(loaded),
        problems=(),
        **{name: torch.stack([tensors[name] for _, tensors in loaded]) for name in loaded[0][1]},
    )


def _pairs_of(number: int, per_shard: int, pairs: int) -> range:
    return range(number * per_shard, min((number + 1) * per_shard, pairs))
