"""The records that pass between the packages: pairs, the points they are asked at, errors and scores.

Shape words used everywhere in this package, in this order:

    side    0 = chosen, 1 = rejected (one entry only for objectives that use the chosen side alone);
            of a ranked list: its images, the best first, so that REJECTED is the second best
    pair    the pairs of the batch; one pair is a batch of one
    point   several (x_t, t) per pair and side; objectives with one point per pair have no such axis
    c h w   latent channels, height, width

A record is a frozen dataclass. Each of its fields with axes declares them once, in `field(metadata=axes(...))`.
Selecting pairs, joining batches, moving and pinning follow from that declaration: no function lists fields by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from diffalign.errors import DiffalignError

CHOSEN, REJECTED = 0, 1
LONGEST_LIST = 8  # images of a ranked list, as in Diffusion-LPO (arXiv 2510.01540)
ALL = slice(None)

R = TypeVar("R", bound="Record")


def axes(names: str, *, cpu: bool = False, derived: bool = False) -> dict[str, Any]:
    """Metadata of a record's field that has axes: a tensor, or a tuple with an entry for each pair.

    names: the axes in order, an optional one in brackets, e.g. "side pair [point] c h w". cpu: the field stays on the
    CPU when its record moves. derived: it holds for this very record, and copies and parts of it are without it.
    """
    return {"axes": tuple(names.split()), "cpu": cpu, "derived": derived}


@dataclass(frozen=True)
class Record:
    """A frozen dataclass whose fields declare their axes; records may contain records."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """A copy with `fn` applied to every tensor."""
        return self._each(lambda value, _: fn(value) if isinstance(value, Tensor) else value)

    def tensors(self) -> list[Tensor]:
        """Every tensor that has axes, in the order of the fields, without derived ones."""
        found: list[Tensor] = []

        def note(x: Tensor) -> Tensor:
            found.append(x)
            return x

        self.map(note)
        return found

    def select(self, *, side: slice = ALL, pair: slice = ALL, point: slice = ALL) -> Self:
        """Some sides, pairs or points; fields without that axis stay as they are."""
        chosen = {"side": side, "pair": pair, "point": point}

        def part(value: Any, declared: Field[Any]) -> Any:
            places = tuple(chosen.get(axis, ALL) for axis in _axes_of(value, declared))
            return value[places] if isinstance(value, Tensor) else value[places[0]]

        return self._each(part)

    def to(self, device: torch.device | str) -> Self:
        """A copy on `device`, without waiting; what the sides share is copied once, fields declared `cpu` stay."""

        def move(value: Any, declared: Field[Any]) -> Any:
            if declared.metadata["cpu"] or not isinstance(value, Tensor):
                return value
            return _shared_once(value, lambda x: x.to(device, non_blocking=True))

        return self._each(move)

    def pin_memory(self) -> Self:
        """A copy in pinned memory; `DataLoader` calls this."""
        return self.map(lambda x: _shared_once(x, Tensor.pin_memory))

    def pair_first(self) -> dict[str, Tensor]:
        """Its tensors by name with the pair axis first, as they are stored; with those of records inside it."""
        found: dict[str, Tensor] = {}
        for declared in fields(self):
            value = getattr(self, declared.name)
            inside = value.pair_first() if isinstance(value, Record) else {}
            if isinstance(value, Tensor):
                inside = {declared.name: value.movedim(_axes_of(value, declared).index("pair"), 0)}
            assert not found.keys() & inside.keys(), "two records inside one have fields of the same names"
            found |= inside
        return found

    def _each(self, fn: Callable[[Any, Field[Any]], Any]) -> Self:
        """A copy with `fn` applied to every field that has axes and a value."""
        changed: dict[str, Any] = {}
        for declared in fields(self):
            value = getattr(self, declared.name)
            if isinstance(value, Record):
                changed[declared.name] = value._each(fn)
            elif value is not None and "axes" in declared.metadata:
                changed[declared.name] = None if declared.metadata["derived"] else fn(value, declared)
        return replace(self, **changed)


def cat(records: Sequence[R], axis: str = "pair") -> R:
    """Records of one class as one, along an axis; views that the sides share stay views.

    Fields without that axis are the first record's. Raises DiffalignError where a field is set in some of them only.
    """
    first = records[0]
    if len(records) == 1:
        return first
    changed: dict[str, Any] = {}
    for declared in fields(first):
        values = [getattr(record, declared.name) for record in records]
        if declared.metadata.get("derived"):
            changed[declared.name] = None
            continue
        there = [value is not None for value in values]
        if not any(there):
            continue
        if not all(there):
            name = f"{type(first).__name__}.{declared.name}"
            raise DiffalignError(f"{name} is set in {sum(there)} of {len(there)} batches; set it in all or in none")
        if isinstance(values[0], Record):
            changed[declared.name] = cat(values, axis)
        elif axis in declared.metadata.get("axes", ()):
            changed[declared.name] = _joined(values, _axes_of(values[0], declared).index(axis))
    return replace(first, **changed)


def _axes_of(value: Any, declared: Field[Any]) -> tuple[str, ...]:
    """The axes of a field's value by name: an optional one is there if the tensor has as many axes."""
    names: tuple[str, ...] = declared.metadata["axes"]
    if isinstance(value, Tensor) and value.ndim < len(names):
        return tuple(name for name in names if not name.startswith("["))
    return tuple(name.strip("[]") for name in names)


def _joined(values: list[Any], dim: int) -> Any:
    if not isinstance(values[0], Tensor):
        return tuple(entry for value in values for entry in value)
    if dim > 0 and all(sides_share(x) for x in values):
        return torch.cat([x[:1] for x in values], dim).expand(len(values[0]), *(-1,) * (values[0].ndim - 1))
    return torch.cat(values, dim)


def sides_share(x: Tensor) -> bool:
    """Whether the first axis is an expanded view."""
    return x.ndim > 0 and x.stride(0) == 0 and len(x) > 1


def _shared_once(x: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """`fn` of a tensor; where its first axis is an expanded view, of one entry, and the result is such a view again."""
    return fn(x[:1]).expand(x.shape) if sides_share(x) else fn(x)


@dataclass(frozen=True)
class Conditioning(Record):
    """The network's inputs besides x_t and t.

    The two sides may differ (SDXL's true sizes and crops do); where they do not, the side axis is an expanded view and
    costs no memory.
    """

    prompt_embeds: Tensor = field(metadata=axes("side pair tokens dim"))
    pooled: Tensor | None = field(default=None, metadata=axes("side pair dim"))  # SDXL's pooled text embedding
    time_ids: Tensor | None = field(default=None, metadata=axes("side pair 6"))
    """SDXL's original h w, crop top left, target h w, in pixels."""
    user: Tensor | None = field(default=None, metadata=axes("side pair dim"))
    """The embedding of the user whose preference a pair is, where pairs have users."""
    distinct_prompts: Tensor | None = field(default=None, metadata=axes("pair tokens dim", derived=True))
    """Of a flat batch whose sides share prompts: those of one side."""

    def flatten(self) -> Conditioning:
        """Side and pair axes merged into one batch axis, side-major: "(side pair) ...".

        Prompts that the sides share come along once as well, for networks that need not work them out twice.
        """
        flat = self.map(lambda x: x.flatten(0, 1))
        return replace(flat, distinct_prompts=self.prompt_embeds[0]) if sides_share(self.prompt_embeds) else flat

    def followed_by(self, other: Conditioning) -> Conditioning:
        """Both along the first axis, this one first; they have the same fields."""
        return cat([self, other], "side")


@dataclass(frozen=True)
class Transitions(Record):
    """Recorded moves of both sides between two noise levels: of a sampler on its way down, of an inversion on its way
    up.

    Where both sides started from one latent, that side axis is an expanded view.
    """

    noisy: Tensor = field(metadata=axes("side pair [point] c h w"))  # x at t
    clean: Tensor = field(metadata=axes("side pair [point] c h w"))  # x at t_prev
    t: Tensor = field(metadata=axes("pair [point]", cpu=True))  # int64
    t_prev: Tensor = field(metadata=axes("pair [point]", cpu=True))  # int64; below 0: the clean image


@dataclass(frozen=True)
class Terms(Record):
    """What the data state about each pair besides its images and prompt: columns of its row.

    They go unchanged from the batch through the probe to the evidence. `data/weights.py` reads them from the columns.
    """

    weight: Tensor | None = field(default=None, metadata=axes("pair"))  # the pair's loss is multiplied by it; None: 1
    margin: Tensor | None = field(default=None, metadata=axes("pair"))  # subtracted from the logit; None: 0
    optimality: Tensor | None = field(default=None, metadata=axes("pair"))
    """In [0, 1], how good the image is among its prompt's; from a source that grades its images, no column. None: 1."""
    mask: Tensor | None = field(default=None, metadata=axes("pair h w"))
    """In [-1, 1], by how much each place of the latents counts: squared errors are multiplied by it; None: 1."""


NO_TERMS = Terms()


@dataclass(frozen=True)
class PairBatch(Record):
    """Clean latents of some pairs and their conditioning: all that an objective may use."""

    latents: Tensor = field(metadata=axes("side pair c h w"))  # scaled VAE latents x_0 (float32)
    cond: Conditioning
    keys: Tensor = field(metadata=axes("pair", cpu=True))
    """int64: the seed of every random draw that belongs to this pair at this visit."""
    uncond: Conditioning | None = None  # the null prompt, only for objectives that guide
    scores: Tensor | None = field(default=None, metadata=axes("side pair", cpu=True))
    """A scorer's value of each image, where the data have it."""
    transitions: Transitions | None = None  # where the source recorded how the images came about
    terms: Terms = NO_TERMS
    reference: Tensor | None = field(default=None, metadata=axes("side pair [point]"))
    """The reference's errors at this visit, where they were precomputed."""
    ids: tuple[str, ...] = field(default=(), metadata=axes("pair"))  # for messages only

    @property
    def pairs(self) -> int:
        """Number of pairs in the batch."""
        return int(self.latents.shape[1])


@dataclass(frozen=True)
class Probe(Record):
    """The points at which policy and reference are asked, and the targets of their predictions.

    `target` is in the network's own prediction space (noise, velocity or sample), so the error is the one the
    network was trained on; `NoiseSchedule.target` makes it from the noise.
    """

    xt: Tensor = field(metadata=axes("side pair [point] c h w"))
    t: Tensor = field(metadata=axes("pair [point]"))  # int64
    target: Tensor = field(metadata=axes("side pair [point] c h w"))
    cond: Conditioning
    needs_reference: bool = True  # False: the objective has no reference model and none is called
    weight: Tensor | None = field(default=None, metadata=axes("pair [point]"))  # the objective's own, of each point
    guidance: float = 1.0  # classifier-free guidance scale of both predictions; 1 = one conditional call
    uncond: Conditioning | None = None  # required when guidance != 1
    points_per_forward: int | None = None  # so many points of each pair in one forward with grad; None = all
    needs_distance: bool = False  # whether the loss depends on `Evidence.distance`
    needs_alignment: bool = False  # whether it depends on `Evidence.alignment`
    scale: Tensor | None = field(default=None, metadata=axes("pair [point]"))  # see `Evidence.scale`
    terms: Terms = NO_TERMS  # the batch's
    reference: Tensor | None = field(default=None, metadata=axes("side pair [point]"))
    """The reference's errors where they are known: it is not asked."""
    reference_answer: Tensor | None = field(default=None, metadata=axes("side pair [point] c h w"))
    """The reference's predictions where they are known; one side if the sides share their inputs."""

    @property
    def points(self) -> int | None:
        """Number of points per pair, or None when the probe has no point axis."""
        return int(self.t.shape[1]) if self.t.ndim == 2 else None

    def evidence(self, policy: Tensor, reference: Tensor | None) -> Evidence:
        """The evidence of errors that were measured at these points."""
        return Evidence(policy, reference, self.t, self.weight, self.terms, scale=self.scale)


@dataclass(frozen=True)
class Evidence(Record):
    """Squared errors of policy and reference, mean over c, h, w, and two inner products: all that a loss may depend on.

    With e = prediction - target, two identities give every inner product of the residuals at a point:

        <e_policy, e_reference> = (policy + reference - distance) / 2      on each side
        <e_chosen, e_rejected>  = alignment[REJECTED]                      of the policy

    A mask multiplies squares and products alike, and enters `alignment` twice (see `engine.measure`).
    """

    policy: Tensor = field(metadata=axes("side pair [point]"))  # float32 or better, carries grad
    reference: Tensor | None = field(default=None, metadata=axes("side pair [point]"))
    """No grad; None for objectives without a reference."""
    t: Tensor | None = field(default=None, metadata=axes("pair [point]"))  # int64
    weight: Tensor | None = field(default=None, metadata=axes("pair [point]"))  # the probe's
    terms: Terms = NO_TERMS  # the probe's
    distance: Tensor | None = field(default=None, metadata=axes("side pair [point]"))
    """(policy - reference)^2, mean over c, h, w; carries grad. None unless the probe needs it."""
    alignment: Tensor | None = field(default=None, metadata=axes("side pair [point]"))
    """<e_chosen, e_side> of the policy, mean over c, h, w; no grad. None unless the probe needs it."""
    scale: Tensor | None = field(default=None, metadata=axes("pair [point]"))
    """By which the scale of the logit is multiplied at this t; None: 1."""

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
    """An objective's result for each pair of the evidence."""

    loss: Tensor  # [pair]; the batch loss is its mean
    logit: Tensor | None  # [pair]; > 0 where the policy already prefers the chosen side; None: no pairwise term
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # each [pair], detached, averaged by the logger
