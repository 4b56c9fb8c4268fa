"""Keeping the reference's errors: every pair of an encode cache once for each draw, by any number of processes.

Batches have the size of training's micro-batches, the last one filled up with pairs of its beginning: kernels are
chosen by shape, and errors that rounded otherwise than the policy's would move margins that are exactly 0.
"""

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
from diffalign.data.cache.reference_errors import shard_name
from diffalign.data.cache.shards import in_own_order, not_finite, sweep, write_shard
from diffalign.data.loader.dataset import Visit
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.row import ImageError
from diffalign.data.sampler import ALONE, Processes
from diffalign.types import PairBatch

FOLDER = "reference_errors"
PAIRS_PER_SHARD = 65536


def reference_key(source: OfflinePairs, cache: PairCache, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a reference's errors depend on: images, prompts, draws of the source; `facts` of network and probe."""
    spec = source.spec
    drawn = {"run_seed": spec.run_seed, "prompt_dropout": spec.prompt_dropout, "batch": spec.train_batch_size}
    return {"format_version": 1, "encoded": asdict(cache.key), **drawn, **facts}


def record_reference(
    source: OfflinePairs,
    cache: PairCache,
    key: Mapping[str, Any],
    errors: Callable[[PairBatch], Tensor],
    draws: int,
    *,
    pairs_per_shard: int = PAIRS_PER_SHARD,
    processes: Processes = ALONE,
    counts: Counts | None = None,
) -> tuple[Path, int]:
    """Fills the folder that belongs to `key` as far as it is not there; returns it with its pairs per shard.

    source: pairs of `cache`. errors: a batch -> "side pair [point]". Finished shards are kept and damaged ones made
    again, so a call goes on after an interruption, and a run with more draws uses those of one with fewer. This process
    makes its share of the shards. `counts` gets the forwards of the shards that are found as well.

    Raises DataError when the folder's manifest is of another key or damaged, and for an error that is not finite.
    """
    text = json.dumps(key, sort_keys=True)
    folder = cache.folder / FOLDER / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    plan, hashed = agreed_plan(folder, key, {"pairs_per_shard": pairs_per_shard, "pairs": cache.pairs})
    per_shard = int(plan["pairs_per_shard"])
    sweep(folder)
    shards = range(-(-cache.pairs // per_shard))
    jobs = {shard_name(draw, number): (draw, number) for draw in range(draws) for number in shards}
    own = processes.share(list(jobs))
    with tqdm(total=len(own), desc="reference errors", unit=" shards", delay=3.0, mininterval=1.0) as bar:
        for name, missing in in_own_order(folder, own, hashed):
            if not missing:
                count_found(folder / name, counts)
            else:
                before = 0 if counts is None else counts.image_forwards
                draw, number = jobs[name]
                pairs = range(number * per_shard, min((number + 1) * per_shard, cache.pairs))
                tensors = {"e": _errors_of(source, pairs, draw, errors)}
                write_shard(folder, name, {**tensors, **spent(before, counts)}, {})
            bar.update(1)
    return folder, per_shard


def _errors_of(source: OfflinePairs, pairs: range, draw: int, errors: Callable[[PairBatch], Tensor]) -> Tensor:
    """The errors of one draw of some pairs, float32 "pair side [point]", NaN where a pair cannot be read."""
    readable: list[int] = []
    parts: list[Tensor] = []
    waiting: list[Visit] = []
    indices: list[int] = []  # of those that wait

    def ask() -> None:
        padded = [waiting[i % len(waiting)] for i in range(source.spec.train_batch_size)]
        made = errors(source.assemble(source.visits.together(padded)))
        parts.append(made.transpose(0, 1)[: len(waiting)].to("cpu", torch.float32))
        for place in not_finite(parts[-1])[:1]:
            raise no_number("reference's error", source, indices[place])
        waiting.clear()
        indices.clear()

    for row, index in enumerate(pairs):
        try:
            waiting.append(source.visits.look(index, draw))
        except ImageError:
            continue  # the encode cache names it, and no visit gets as far as its errors
        readable.append(row)
        indices.append(index)
        if len(waiting) == source.spec.train_batch_size:
            ask()
    if waiting:
        ask()
    if not parts:
        return torch.full((len(pairs), 2), float("nan"))
    together = torch.cat(parts)
    out = torch.full((len(pairs), *together.shape[1:]), float("nan"))
    out[torch.tensor(readable)] = together
    return out
