"""The five records that pass between the rooms: what is fed in, asked, measured and scored.

Shape words used everywhere in this package:

    side    0 = chosen, 1 = rejected (one entry only for objectives that use the chosen side alone)
    pair    the pairs of the batch
    point   several (x_t, t) per pair and side; objectives with one point per pair have no such axis
    c h w   latent channels, height, width

Every record is frozen, holds tensors only where a tensor is meant, and knows how to move itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R", "Conditioning", "PairBatch")

CHOSEN, REJECTED = 0, 1


def _map_tensors(record: R, fn: Callable[[Tensor], Tensor]) -> R:
    """A copy of a dataclass with `fn` applied to each tensor in it, nested records included."""
    changed: dict[str, Any] = {}
    for f in fields(record):
        value = getattr(record, f.name)
        if isinstance(value, Tensor):
            changed[f.name] = fn(value)
        elif isinstance(value, Conditioning):
            changed[f.name] = _map_tensors(value, fn)
    return replace(record, **changed)


@dataclass(frozen=True)
class Conditioning:
    """What the network is told besides x_t and t.

    The two sides may differ (SDXL's true sizes and crops do); where they do not, the side axis is
    an expanded view and costs no memory.
    """

    prompt_embeds: Tensor  # "side pair tokens dim"
    pooled: Tensor | None = None  # "side pair dim", SDXL's pooled text embedding
    time_ids: Tensor | None = None  # "side pair 6", SDXL: original h w, crop top left, target h w (pixels)

    def select(self, sides: slice, pairs: slice) -> Conditioning:
        """The same conditioning for some sides and pairs."""
        return self.map(lambda x: x[sides, pairs])

    def flatten(self) -> Conditioning:
        """Side and pair axes merged into one batch axis, side-major: "(side pair) ..."."""
        return self.map(lambda x: x.flatten(0, 1))

    def to(self, device: torch.device | str) -> Conditioning:
        """A copy on `device`; dtypes stay."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Conditioning:
        """A copy with `fn` applied to every tensor."""
        return _map_tensors(self, fn)


@dataclass(frozen=True)
class PairBatch:
    """Clean latents of some pairs and what they were conditioned on: all that an objective may look at."""

    latents: Tensor  # "side pair c h w", scaled VAE latents x_0 (float32)
    cond: Conditioning
    keys: Tensor  # int64 [pair]: seed of every random draw that belongs to this pair at this visit
    uncond: Conditioning | None = None  # the null prompt, only for objectives that guide
    scores: Tensor | None = None  # "side pair": a scorer's value of each image, where the data have it
    ids: tuple[str, ...] = field(default=())  # for messages only

    @property
    def pairs(self) -> int:
        """Number of pairs in the batch."""
        return int(self.latents.shape[1])

    def to(self, device: torch.device | str) -> PairBatch:
        """A copy on `device`; `keys` stay on the CPU, where the generators are."""
        moved = _map_tensors(self, lambda x: x.to(device, non_blocking=True))
        return replace(moved, keys=self.keys)


@dataclass(frozen=True)
class Probe:
    """The points at which policy and reference are asked, and what they should have answered.

    `target` is in the network's own prediction space (noise, velocity or sample), so the error is the one the
    network was trained on; `NoiseSchedule.target` makes it from the noise.
    """

    xt: Tensor  # "side pair [point] c h w"
    t: Tensor  # int64 "pair [point]"
    target: Tensor  # as xt
    cond: Conditioning
    needs_reference: bool = True  # False: the objective has no reference model and none is called
    weight: Tensor | None = None  # "pair [point]", passed on to Evidence untouched
    guidance: float = 1.0  # classifier-free guidance scale of both predictions; 1 = one conditional call
    uncond: Conditioning | None = None  # required when guidance != 1

    @property
    def points(self) -> int | None:
        """Number of points per pair, or None when the probe has no point axis."""
        return int(self.t.shape[1]) if self.t.ndim == 2 else None


@dataclass(frozen=True)
class Evidence:
    """Squared errors of policy and reference, mean over c, h, w: all that a loss may depend on."""

    policy: Tensor  # "side pair [point]", float32 or better, carries grad
    reference: Tensor | None = None  # same shape, no grad; None for objectives without a reference
    t: Tensor | None = None  # int64 "pair [point]"
    weight: Tensor | None = None  # "pair [point]", the probe's

    @property
    def margin(self) -> Tensor:
        """D = E_policy - E_reference, "side pair [point]"; negative: the policy denoises better."""
        if self.reference is None:
            raise ValueError(
                "this evidence has no reference errors, and the objective compares policy with reference; "
                "measure it with a reference (tuning.reference: copy, or a LoRA policy)"
            )
        return self.policy - self.reference


@dataclass(frozen=True)
class Score:
    """What an objective made of the evidence."""

    loss: Tensor  # [pair]; the batch loss is its mean
    logit: Tensor | None  # [pair]; > 0 where the policy already prefers the chosen side; None: no pairwise term
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # each [pair], detached, averaged by the logger
