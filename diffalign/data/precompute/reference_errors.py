"""Precomputing the reference's errors: every pair of a latent cache once for each draw, by any number of processes.

Batches have the size of training's micro-batches, the last one filled up with pairs of its beginning: kernels are
chosen by shape, and errors that rounded otherwise than the policy's would move margins that are exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.data.cache.reference_errors import shard_name
from diffalign.data.cache.shards import not_finite
from diffalign.data.loader.loaded import Loaded
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.precompute.recording import Work, cache_of, not_a_number, open_recording
from diffalign.data.row import ImageError
from diffalign.types import PairBatch, cat

FOLDER = "reference_errors"
PAIRS_PER_SHARD = 65536

Errors = Callable[[PairBatch], Tensor]  # a batch -> "side pair [point]"


def reference_key(source: OfflinePairs, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a reference's errors depend on: images, prompts, draws of the source; `facts` of network and probe."""
    spec = source.spec
    drawn = {"run_seed": spec.run_seed, "prompt_dropout": spec.prompt_dropout, "batch": spec.train_batch_size}
    return {"format_version": 1, "encoded": asdict(cache_of(source).key), **drawn, **facts}


def record_reference(
    source: OfflinePairs,
    key: Mapping[str, Any],
    errors: Errors,
    draws: int,
    work: Work,
    pairs_per_shard: int = PAIRS_PER_SHARD,
) -> tuple[Path, int]:
    """Fills the folder that belongs to `key` as far as it is not there; returns it with its pairs per shard.

    source: pairs of a latent cache; batches have the size that it trains with. A run with more draws uses the shards of
    one with fewer.

    Raises DataError when the folder's manifest is of another key or damaged, and for an error that is not finite.
    """
    recording = open_recording(cache_of(source), FOLDER, key, pairs_per_shard)
    parts = list(enumerate(recording.parts()))
    jobs = {shard_name(draw, number): (pairs, draw) for draw in range(draws) for number, pairs in parts}
    recording.fill(list(jobs), lambda name: {"e": _errors_of(source, *jobs[name], errors)}, work, "reference errors")
    return recording.folder, recording.pairs_per_shard


def _errors_of(source: OfflinePairs, pairs: range, draw: int, errors: Errors) -> Tensor:
    """The errors of one draw of some pairs, float32 "pair side [point]", NaN where a pair cannot be read."""
    rows: list[int] = []  # of the readable pairs, in the shard
    parts: list[Tensor] = []
    readable, size = _readable(source, pairs, draw), source.spec.train_batch_size
    while some := list(islice(readable, size)):
        batch = source.assemble(cat([some[i % len(some)][1] for i in range(size)]))
        parts.append(errors(batch).transpose(0, 1)[: len(some)].to("cpu", torch.float32))
        for place in not_finite(parts[-1])[:1]:
            raise not_a_number("reference's error", source, pairs[some[place][0]])
        rows += [row for row, _ in some]
    if not parts:
        return torch.full((len(pairs), source.table.count(pairs[0])), float("nan"))
    together = torch.cat(parts)
    out = torch.full((len(pairs), *together.shape[1:]), float("nan"))
    out[torch.tensor(rows)] = together
    return out


def _readable(source: OfflinePairs, pairs: range, draw: int) -> Iterator[tuple[int, Loaded]]:
    """The pairs that can be read, with their rows in the shard."""
    for row, index in enumerate(pairs):
        try:
            yield row, source.visits.pair(index, draw)
        except ImageError:
            continue  # the latent cache names it, and no visit gets as far as its errors
