"""The records that pass between the rooms: what is fed in, asked, measured and scored.

Shape words used everywhere in this package:

    side    0 = chosen, 1 = rejected (one entry only for objectives that use the chosen side alone)
    pair    the pairs of the batch
    point   several (x_t, t) per pair and side; objectives with one point per pair have no such axis
    c h w   latent channels, height, width

Every record is frozen and holds tensors only where a tensor is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffalign.errors import DiffalignError

CHOSEN, REJECTED = 0, 1


def _move(x: Tensor, device: torch.device | str) -> Tensor:
    """A copy on `device` without waiting; an axis that is only an expanded view stays one and is copied once."""
    if x.ndim and x.stride(0) == 0 and len(x) > 1:
        return x[:1].to(device, non_blocking=True).expand(x.shape)
    return x.to(device, non_blocking=True)


@dataclass(frozen=True)
class Conditioning:
    """What the network is told besides x_t and t.

    The two sides may differ (SDXL's true sizes and crops do); where they do not, the side axis is
    an expanded view and costs no memory.
    """

    prompt_embeds: Tensor  # "side pair tokens dim"
    pooled: Tensor | None = None  # "side pair dim", SDXL's pooled text embedding
    time_ids: Tensor | None = None  # "side pair 6", SDXL: original h w, crop top left, target h w (pixels)
    user: Tensor | None = None  # "side pair dim", the embedding of whoever preferred, for user attention
    distinct_prompts: Tensor | None = None  # of a flat batch whose sides share prompts: one side's, "pair tokens dim"

    def select(self, sides: slice, pairs: slice) -> Conditioning:
        """The same conditioning for some sides and pairs."""
        return self.map(lambda x: x[sides, pairs])

    def flatten(self) -> Conditioning:
        """Side and pair axes merged into one batch axis, side-major: "(side pair) ...".

        Prompts that the sides share come along once as well, for networks that need not work them out twice.
        """
        shared = len(self.prompt_embeds) > 1 and self.prompt_embeds.stride(0) == 0
        flat = self.map(lambda x: x.flatten(0, 1))
        return replace(flat, distinct_prompts=self.prompt_embeds[0]) if shared else flat

    def to(self, device: torch.device | str) -> Conditioning:
        """A copy on `device`; dtypes stay, and what the sides share is copied once."""
        return self.map(lambda x: _move(x, device))

    def followed_by(self, other: Conditioning) -> Conditioning:
        """Both along the first axis, this one first; they have the same fields."""

        def join(x: Tensor | None, y: Tensor | None) -> Tensor | None:
            return None if x is None or y is None else torch.cat([x, y])

        return Conditioning(
            prompt_embeds=torch.cat([self.prompt_embeds, other.prompt_embeds]),
            pooled=join(self.pooled, other.pooled),
            time_ids=join(self.time_ids, other.time_ids),
            user=join(self.user, other.user),
        )

    def map(self, fn: Callable[[Tensor], Tensor]) -> Conditioning:
        """A copy with `fn` applied to every tensor; without `distinct_prompts`, which hold for a whole batch."""
        return Conditioning(
            prompt_embeds=fn(self.prompt_embeds),
            pooled=None if self.pooled is None else fn(self.pooled),
            time_ids=None if self.time_ids is None else fn(self.time_ids),
            user=None if self.user is None else fn(self.user),
        )


@dataclass(frozen=True)
class Transitions:
    """Recorded moves of both sides between two noise levels: of a sampler on its way down, of an inversion on its way
    up.

    Where both sides started from one latent, that side axis is an expanded view.
    """

    noisy: Tensor  # "side pair [point] c h w", x at t
    clean: Tensor  # "side pair [point] c h w", x at t_prev
    t: Tensor  # int64 "pair [point]", CPU
    t_prev: Tensor  # int64 "pair [point]", CPU; below 0: the clean image

    def select(self, pairs: slice) -> Transitions:
        """The transitions of some of the pairs."""
        return Transitions(self.noisy[:, pairs], self.clean[:, pairs], self.t[pairs], self.t_prev[pairs])

    def to(self, device: torch.device | str) -> Transitions:
        """A copy on `device`; timesteps stay on the CPU, and what the sides share is copied once."""
        return replace(self, noisy=_move(self.noisy, device), clean=_move(self.clean, device))


@dataclass(frozen=True)
class PairBatch:
    """Clean latents of some pairs and what they were conditioned on: all that an objective may look at."""

    latents: Tensor  # "side pair c h w", scaled VAE latents x_0 (float32)
    cond: Conditioning
    keys: Tensor  # int64 [pair], CPU: seed of every random draw that belongs to this pair at this visit
    uncond: Conditioning | None = None  # the null prompt, only for objectives that guide
    scores: Tensor | None = None  # "side pair", CPU: a scorer's value of each image, where the data have it
    transitions: Transitions | None = None  # where the source recorded how the images came about
    weight: Tensor | None = None  # [pair], what the pair's loss is multiplied by; None: 1
    margin: Tensor | None = None  # [pair], subtracted from the logit; None: 0
    mask: Tensor | None = None  # "pair h w" in [-1, 1], how much each place of the latents counts; None: 1
    reference: Tensor | None = None  # "side pair [point]", the reference's errors at this visit, where they were kept
    ids: tuple[str, ...] = field(default=())  # for messages only

    @property
    def pairs(self) -> int:
        """Number of pairs in the batch."""
        return int(self.latents.shape[1])

    def select(self, pairs: slice) -> PairBatch:
        """Some of the pairs as a batch of their own."""
        return PairBatch(
            latents=self.latents[:, pairs],
            cond=self.cond.select(slice(None), pairs),
            keys=self.keys[pairs],
            uncond=None if self.uncond is None else self.uncond.select(slice(None), pairs),
            scores=None if self.scores is None else self.scores[:, pairs],
            transitions=None if self.transitions is None else self.transitions.select(pairs),
            weight=None if self.weight is None else self.weight[pairs],
            margin=None if self.margin is None else self.margin[pairs],
            mask=None if self.mask is None else self.mask[pairs],
            reference=None if self.reference is None else self.reference[:, pairs],
            ids=self.ids[pairs],
        )

    def to(self, device: torch.device | str) -> PairBatch:
        """A copy on `device`; `keys` and `scores` stay on the CPU, where generators are and checks cost no wait."""
        return replace(
            self,
            latents=_move(self.latents, device),
            cond=self.cond.to(device),
            uncond=None if self.uncond is None else self.uncond.to(device),
            transitions=None if self.transitions is None else self.transitions.to(device),
            weight=None if self.weight is None else _move(self.weight, device),
            margin=None if self.margin is None else _move(self.margin, device),
            mask=None if self.mask is None else _move(self.mask, device),
            reference=None if self.reference is None else _move(self.reference, device),
        )


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
    points_per_forward: int | None = None  # so many points of each pair in one forward with grad; None = all
    mask: Tensor | None = None  # "pair h w", what squared errors are multiplied by; the batch's, as the next two
    pair_weight: Tensor | None = None  # [pair], passed on to Evidence
    pair_margin: Tensor | None = None  # [pair], passed on to Evidence
    reference: Tensor | None = None  # "side pair [point]", the reference's errors where they are known: it is not asked

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
    pair_weight: Tensor | None = None  # [pair], what the loss is going to be multiplied by
    pair_margin: Tensor | None = None  # [pair], to be subtracted from the logit

    @property
    def margin(self) -> Tensor:
        """D = E_policy - E_reference, "side pair [point]"; negative: the policy denoises better."""
        if self.reference is None:
            raise DiffalignError(
                "this evidence has no reference errors, and the objective compares policy with reference; "
                "measure it with a reference (`Probe.needs_reference`, and `Networks` with a reference)"
            )
        return self.policy - self.reference


@dataclass(frozen=True)
class Score:
    """What an objective made of the evidence."""

    loss: Tensor  # [pair]; the batch loss is its mean
    logit: Tensor | None  # [pair]; > 0 where the policy already prefers the chosen side; None: no pairwise term
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # each [pair], detached, averaged by the logger
