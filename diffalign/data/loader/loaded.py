"""`Loaded`: some pairs as they are read at a visit, before what is not stored is encoded."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from diffalign.data.row import Problem
from diffalign.engine.random import normal
from diffalign.types import NO_TERMS, Conditioning, Record, Terms, Transitions, axes

NULL_PROMPT = ""


@dataclass(frozen=True)
class Loaded(Record):
    """Pairs at one visit each; either pixels (images and prompts are still to be encoded) or latents.

    One pair is a batch of one: reading makes it so, and `types.cat` makes the micro-batch.
    """

    keys: Tensor = field(metadata=axes("pair"))  # int64, as in PairBatch
    geometry: Tensor = field(metadata=axes("side pair 6"))  # int64, see `transforms.prepare_pair`
    pixels: Tensor | None = field(default=None, metadata=axes("side pair 3 H W"))
    latents: Tensor | None = field(default=None, metadata=axes("side pair c h w"))
    cond: Conditioning | None = None  # text embeddings from a cache
    user: Tensor | None = field(default=None, metadata=axes("side pair dim"))  # see `Conditioning.user`
    scores: Tensor | None = field(default=None, metadata=axes("side pair"))
    transitions: Transitions | None = None
    terms: Terms = NO_TERMS
    reference: Tensor | None = field(default=None, metadata=axes("side pair [point]"))  # precomputed errors
    ids: tuple[str, ...] = field(default=(), metadata=axes("pair"))
    prompts: tuple[str, ...] = field(default=(), metadata=axes("pair"))  # after dropout
    problems: tuple[tuple[Problem, ...], ...] = field(default=(), metadata=axes("pair"))
    """Of the unreadable pairs that each pair stands in for."""


def sample_latents(moments: Tensor, keys: Tensor) -> Tensor:
    """Latents float32 "side pair c h w": mean + std · normal, drawn per pair, from moments "side pair 2c h w"."""
    mean, std = moments.float().chunk(2, dim=2)
    noise = normal(keys, "vae", (len(mean), *mean.shape[2:])).transpose(0, 1)
    return mean + std * noise.to(mean.device, non_blocking=True)
