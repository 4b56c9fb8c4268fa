"""The interface of an objective, and what most objectives share: the shared-noise probe and the reward metrics.

An objective is a frozen dataclass whose fields are its hyper-parameters. It inherits from `Objective`, which declares
every trait with its default, or from `OnSharedNoise`. `probe` chooses the points at which the networks are evaluated,
and `score` computes the loss of each pair from the errors there: the paper's equation.

A pair may have a weight, a margin and a mask (`types.Terms`). The engine applies weights and masks. `require_terms`
refuses a margin or a mask with negative values if the objective does not declare that it supports them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from diffalign.engine.measure import Models
from diffalign.engine.random import integers, normal, on_device, uniform
from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError
from diffalign.objectives.timesteps import TimestepDensity
from diffalign.types import CHOSEN, REJECTED, Evidence, PairBatch, Probe, Score

# graded images: one for each pair, with an optimality; steps: transitions that a sampler recorded;
# lists: all images of a ranked list, and a pair is a list of two
Compared = Literal["images", "chosen images", "graded images", "steps", "lists"]


class Objective(Protocol):
    """The interface of a preference objective. Inherit from it to have the defaults."""

    name: ClassVar[str]  # the name in configs
    paper: ClassVar[str]  # "Authors, title, arXiv id"
    needs_reference: ClassVar[bool] = True  # False: no reference model is loaded or called
    compares: ClassVar[Compared] = "images"  # what it uses of a pair
    takes_margin: ClassVar[bool] = False  # True: its loss is of log σ(logit), less the margin in the logit
    takes_signs: ClassVar[bool] = False  # True: the loss depends on a difference of the sides; a mask of −1 swaps them
    takes_safeguard: ClassVar[bool] = False  # True: its loss is of the difference of the sides' errors (`modified.py`)
    needs_distance: ClassVar[bool] = False  # True: the loss depends on `Evidence.distance`
    needs_alignment: ClassVar[bool] = False  # True: it depends on `Evidence.alignment`
    scale_field: ClassVar[str | None] = None  # the field that scales the logit near the reference, for `calibrate`
    scale_spread: ClassVar[float] = 1.0  # the spread of logits that `diffalign calibrate` sets
    scale_in_logit: ClassVar[bool] = True  # False: the reported logit is the difference of errors, without scale

    @property
    def needs_uncond(self) -> bool:
        """Whether batches must contain the null prompt's conditioning, for guidance."""
        return False

    @property
    def drawn(self) -> dict[str, Any] | None:
        """All settings that its points depend on, as plain values by name; None if a network determines the points.

        Points that depend on the pair and its draw alone repeat, so the reference's errors there can be cached.
        """
        return None

    @property
    def recording(self) -> dict[str, Any] | None:
        """All settings that its trajectories depend on (`Recordable`), by name; None if they cannot be cached."""
        return None

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """Raises DiffalignError if the settings do not fit the model's schedule."""
        return

    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """The points at which the networks are evaluated; computed without grad."""
        ...

    def weigh(self, probe: Probe, schedule: NoiseSchedule) -> Probe:
        """Points that were drawn for it, with what `score` needs to know of their timesteps."""
        return probe

    def score(self, evidence: Evidence) -> Score:
        """The loss of each pair from its errors; a pure function."""
        ...


class Recordable(Objective, Protocol):
    """An objective on trajectories that training does not change, so that they can be computed once and cached.

    The trajectories of a pair depend on its images and prompt, the base model, and the settings in `recording`. A batch
    with `PairBatch.transitions` needs no inversion.
    """

    def record(self, batch: PairBatch, models: Models) -> Tensor:
        """Whole trajectories, "side pair level c h w", without grad; level 0 is the clean image."""
        ...

    def levels(self, schedule: NoiseSchedule) -> Tensor:
        """t of each level, int64 [level]; negative for the clean image."""
        ...

    def visited(self, keys: Tensor) -> Tensor:
        """The transitions of a visit, int64 [pair, point]; transition k leads from level k to level k + 1."""
        ...


@dataclass(frozen=True)
class SharedNoise:
    """The settings of `shared_noise`; calling it makes the probe, and `drawn` lists what the probe depends on."""

    timesteps: tuple[int, ...] | None = None  # the values of t to draw from; None: all
    sides: int = 2  # at most so many, the best first; 1: the chosen images alone
    needs_reference: bool = True
    density: TimestepDensity | None = None  # of t; None: uniform

    @property
    def drawn(self) -> dict[str, Any]:
        """See `Objective.drawn`."""
        found = {"points": "shared_noise", "timesteps": None if self.timesteps is None else list(self.timesteps)}
        if self.density is not None:
            found |= self.density.drawn
        return found if self.sides > 1 else {**found, "sides": self.sides}

    def __call__(self, batch: PairBatch, schedule: NoiseSchedule) -> Probe:
        return shared_noise(
            batch,
            schedule,
            timesteps=self.timesteps,
            sides=self.sides,
            needs_reference=self.needs_reference,
            density=self.density,
        )


class OnSharedNoise(Objective, Protocol):
    """An objective at one timestep t and one noise ε for each pair, shared by its sides, as in Diffusion-DPO."""

    @property
    def points(self) -> SharedNoise:
        """The settings of its points."""
        return SharedNoise(needs_reference=self.needs_reference)

    @property
    def drawn(self) -> dict[str, Any] | None:
        """What its points depend on; None if a subclass has its own `probe`."""
        return self.points.drawn if type(self).probe is OnSharedNoise.probe else None

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """Raises DiffalignError for a timestep outside the schedule."""
        timesteps_fit(self.points.timesteps, schedule)

    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """One (t, ε) for each pair; see `shared_noise`."""
        return self.points(batch, models.schedule)


def shared_noise(
    batch: PairBatch,
    schedule: NoiseSchedule,
    *,
    timesteps: tuple[int, ...] | None = None,
    sides: int = 2,
    needs_reference: bool = True,
    density: TimestepDensity | None = None,
) -> Probe:
    """A probe at one uniform t and one normal ε for each pair, shared by its sides; the target follows from ε.

    t is one of `timesteps` (for a distilled model, those it was trained at), or of 0 … T−1 if that is None. A `density`
    replaces the uniform one. With `sides` = 1 the probe has the chosen images alone. Source: Diffusion-DPO
    (arXiv 2311.12908), eq. 14 and released code.
    """
    x0 = batch.latents[:sides]
    if density is not None:
        allowed = torch.arange(schedule.num_train_timesteps) if timesteps is None else torch.tensor(sorted(timesteps))
        t = allowed[density.places(uniform(batch.keys, "t"), len(allowed))]
    elif timesteps is None:
        t = integers(batch.keys, "t", 0, schedule.num_train_timesteps)
    else:
        t = torch.tensor(timesteps)[integers(batch.keys, "t", 0, len(timesteps))]
    noise = on_device(normal(batch.keys, "noise", x0.shape[2:]), x0.device).expand_as(x0)
    t_sides = t.expand(x0.shape[:2])
    return Probe(
        xt=schedule.add_noise(x0, noise, t_sides),
        t=t,
        target=schedule.target(x0, noise, t_sides),
        cond=batch.cond.select(side=slice(0, sides)),
        needs_reference=needs_reference,
    )


def shared_points(objective: Objective) -> SharedNoise | None:
    """The settings of an objective's points where it draws t and ε itself; None where it has its own `probe`."""
    if OnSharedNoise in type(objective).__mro__ and type(objective).probe is not OnSharedNoise.probe:
        return None
    found = getattr(objective, "points", None)
    return found if isinstance(found, SharedNoise) else None


def ask(objective: Objective, batch: PairBatch, models: Models, points: SharedNoise | None = None) -> Probe:
    """The objective's probe of a batch, with the pairs' terms (weight, margin, mask) and precomputed reference errors.

    points: in place of the objective's own.
    Raises DiffalignError for margins that the objective does not support, and for masks of another size than the
    latents.
    """
    if batch.terms.margin is not None:
        require_terms(objective, margin=True, signs=False)
    if batch.terms.mask is not None:
        _require_size(batch.terms.mask, (batch.pairs, *batch.latents.shape[-2:]))
    with torch.no_grad():
        if points is None:
            probe = objective.probe(batch, models)
        else:
            probe = objective.weigh(points(batch, models.schedule), models.schedule)
    return replace(
        probe,
        terms=batch.terms,
        reference=batch.reference,
        needs_distance=objective.needs_distance,
        needs_alignment=objective.needs_alignment,
    )


def _require_size(mask: Tensor, size: tuple[int, ...]) -> None:
    if tuple(mask.shape) != size:
        raise DiffalignError(
            f"a mask of shape {tuple(mask.shape)}: give masks of the latents' size, (pair, h, w) = {size}"
        )


def require_terms(objective: Objective, *, margin: bool, signs: bool) -> None:
    """Raises DiffalignError for margins, or for negative masks (`signs`), that the objective does not support."""
    if margin and not objective.takes_margin:
        raise DiffalignError(
            f"the data have a margin for each pair, and {objective.name} has no log σ(logit) to subtract it from; "
            "remove or rename the column, or use an objective with one, e.g. dpo"
        )
    if signs and not objective.takes_signs:
        raise DiffalignError(
            f"a mask below 0 swaps the sides of a part of the image, and the loss of {objective.name} does not depend "
            "on a difference of the sides; use masks in [0, 1], or an objective like dpo"
        )


def less_margin(logit: Tensor, evidence: Evidence) -> Tensor:
    """The logit minus the margin of each pair, if the data have margins."""
    margin = evidence.terms.margin
    return logit if margin is None else logit - margin.to(logit)


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """TRL's reward metrics and Diffusion-DPO's `implicit_acc` from both sides' implicit rewards; [pair], detached."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "implicit_acc": (chosen > rejected).float(),
    }


def dpo_logit(evidence: Evidence, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Diffusion-DPO's logit −(β/2)(D^c − D^r), with D = E_policy − E_reference, and its metrics; each [pair]."""
    reward = -(beta / 2) * evidence.margin
    logit = reward[CHOSEN] - reward[REJECTED]
    return logit, reward_metrics(reward[CHOSEN], reward[REJECTED])


def positive(name: str, value: float) -> None:
    """Raises DiffalignError unless a hyper-parameter is a finite number above 0."""
    if not 0 < value < float("inf"):
        raise DiffalignError(f"{name} = {value}: must be a finite number above 0")


def timesteps_fit(timesteps: tuple[int, ...] | None, schedule: NoiseSchedule) -> None:
    """Raises DiffalignError for a timestep outside the schedule."""
    if timesteps is not None and max(timesteps) >= schedule.num_train_timesteps:
        raise DiffalignError(
            f"timesteps = {list(timesteps)}: the model's schedule has 0 … {schedule.num_train_timesteps - 1}; remove "
            "the others, or set null for all"
        )


def timesteps_valid(timesteps: tuple[int, ...] | None) -> None:
    """Raises DiffalignError for an empty set of timesteps, and for negative ones."""
    if timesteps is not None and (not timesteps or min(timesteps) < 0):
        raise DiffalignError(f"timesteps = {timesteps}: give at least one timestep and none below 0, or null for all")


def noise_rate(e: float) -> None:
    """Raises DiffalignError unless a share of wrong labels is in [0, 0.5)."""
    if not 0 <= e < 0.5:
        raise DiffalignError(f"label_smoothing = {e}: must be in [0, 0.5), the share of labels assumed to be wrong")
