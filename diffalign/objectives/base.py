"""What an objective is, and the two things most of them share: the shared-noise probe and the reward metrics.

An objective is a frozen dataclass whose fields are its hyper-parameters. It inherits from `Objective`, which declares
every trait with its default, or from `OnSharedNoise`, and says where the networks are asked (`probe`) and what the
loss of a pair is (`score`, the paper's equation).

A pair may have a weight, a margin and a mask (`types.Terms`). The engine applies weights and masks. `require_terms`
refuses a margin or a signed mask where the objective has not declared that it takes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from diffalign.engine.measure import Models
from diffalign.engine.random import integers, normal, on_device
from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError
from diffalign.types import CHOSEN, REJECTED, Evidence, PairBatch, Probe, Score


class Objective(Protocol):
    """A preference objective, as a run sees it. An objective inherits from this class, and so has its defaults."""

    name: ClassVar[str]  # the name in configs
    paper: ClassVar[str]  # "Authors, title, arXiv id"
    needs_reference: ClassVar[bool] = True  # False: no reference model is made or called
    takes_margin: ClassVar[bool] = False  # its loss is made of log σ(logit), of which it takes the logit `less_margin`
    takes_signs: ClassVar[bool] = False  # it compares the sides by a plain difference: a mask of −1 swaps them
    scale_field: ClassVar[str | None] = None  # the field to which the logit is proportional near the reference
    scale_spread: ClassVar[float] = 1.0  # the spread of logits that `diffalign calibrate` aims at
    scale_in_logit: ClassVar[bool] = True  # False: the reported logit is the bare difference of errors

    @property
    def needs_uncond(self) -> bool:
        """Whether batches must carry the null prompt's conditioning (guidance)."""
        return False

    @property
    def drawn(self) -> dict[str, Any] | None:
        """All settings that its points depend on, plain values by name, where they follow from a pair and its draw and
        from no network: the reference's errors there can be cached. None: a network chooses the points.
        """
        return None

    @property
    def recording(self) -> dict[str, Any] | None:
        """All settings that a trajectory depends on (`Recordable`), plain values by name; None: it cannot be cached."""
        return None

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """Raises DiffalignError where the settings do not fit a model's schedule."""
        return

    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """The points to ask at, made without grad."""
        ...

    def score(self, evidence: Evidence) -> Score:
        """The loss of each pair from its errors: a pure function."""
        ...


class Recordable(Objective, Protocol):
    """An objective that asks at transitions of a trajectory which no training changes: it can be made once and cached.

    The trajectory of a pair depends on its images, prompt and base model and on what `recording` says. A batch that
    carries `PairBatch.transitions` needs no inversion.
    """

    def record(self, batch: PairBatch, models: Models) -> Tensor:
        """Whole trajectories without grad, "side pair level c h w"; level 0 is the clean image."""
        ...

    def levels(self, schedule: NoiseSchedule) -> Tensor:
        """t of each level, int64 [level]; below 0: the clean image."""
        ...

    def visited(self, keys: Tensor) -> Tensor:
        """Transitions that a visit asks at, int64 [pair, point]; k leads from level k to level k + 1."""
        ...


@dataclass(frozen=True)
class SharedNoise:
    """Points by `shared_noise`: called, it makes the probe; `drawn` says what the probe depends on."""

    timesteps: tuple[int, ...] | None = None
    sides: int = 2
    needs_reference: bool = True

    @property
    def drawn(self) -> dict[str, Any]:
        """See `Objective.drawn`."""
        found = {"points": "shared_noise", "timesteps": None if self.timesteps is None else list(self.timesteps)}
        return found if self.sides == 2 else {**found, "sides": self.sides}

    def __call__(self, batch: PairBatch, schedule: NoiseSchedule) -> Probe:
        return shared_noise(
            batch, schedule, timesteps=self.timesteps, sides=self.sides, needs_reference=self.needs_reference
        )


class OnSharedNoise(Objective, Protocol):
    """An objective that asks at one (t, ε) for each pair, shared by its sides, as Diffusion-DPO does."""

    @property
    def points(self) -> SharedNoise:
        """Where it asks."""
        return SharedNoise(needs_reference=self.needs_reference)

    @property
    def drawn(self) -> dict[str, Any] | None:
        """What its points depend on; None where a subclass has a probe of its own."""
        return self.points.drawn if type(self).probe is OnSharedNoise.probe else None

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """Raises DiffalignError for a timestep that the schedule does not have."""
        timesteps_fit(self.points.timesteps, schedule)

    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """One (t, ε) for each pair."""
        return self.points(batch, models.schedule)


def shared_noise(
    batch: PairBatch,
    schedule: NoiseSchedule,
    *,
    timesteps: tuple[int, ...] | None = None,
    sides: int = 2,
    needs_reference: bool = True,
) -> Probe:
    """One uniformly drawn t and one normal ε for each pair, shared by its sides; the target is that ε.

    `timesteps` restricts t to a set (a distilled model's own); None means 0 … T−1. `sides` = 1 asks at the chosen
    images only. Source: Diffusion-DPO (arXiv 2311.12908), eq. 14 and its released code.
    """
    x0 = batch.latents[:sides]
    if timesteps is None:
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


def ask(objective: Objective, batch: PairBatch, models: Models) -> Probe:
    """The objective's probe, without grad, with the pairs' terms (weight, margin, mask) and precomputed errors.

    Raises ValueError for a margin where the objective has no use for one, or a mask that is not of the latents' size.
    """
    mask = batch.terms.mask
    require_terms(objective, margin=batch.terms.margin is not None, signs=False)
    places = (batch.pairs, *batch.latents.shape[-2:])
    if mask is not None and tuple(mask.shape) != places:
        raise DiffalignError(f"a mask of shape {tuple(mask.shape)}: these latents need (pair, h, w) = {places}")
    with torch.no_grad():
        probe = objective.probe(batch, models)
    return replace(probe, terms=batch.terms, reference=batch.reference)


def require_terms(objective: Objective, *, margin: bool, signs: bool) -> None:
    """Raises ValueError where pairs have margins, or masks below 0, and the objective can do nothing with them."""
    if margin and not objective.takes_margin:
        raise DiffalignError(
            f"the data have a margin for each pair, and {objective.name} has no log σ(logit) to subtract it from: "
            "remove or rename the column, or use an objective that has, e.g. dpo"
        )
    if signs and not objective.takes_signs:
        raise DiffalignError(
            f"a mask below 0 swaps the sides of a part of the picture, and {objective.name} does not compare the sides "
            "by a plain difference: use masks in [0, 1], or an objective that does, e.g. dpo"
        )


def less_margin(logit: Tensor, evidence: Evidence) -> Tensor:
    """The logit minus each pair's margin, where the data have margins."""
    margin = evidence.terms.margin
    return logit if margin is None else logit - margin.to(logit)


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """TRL's reward names, and Diffusion-DPO's `implicit_acc`, from both sides' implicit rewards; [pair], detached."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "implicit_acc": (chosen > rejected).float(),
    }


def dpo_logit(evidence: Evidence, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The logit −(β/2)(D^c − D^r) of the Diffusion-DPO family with its metrics, D = E_policy − E_reference."""
    reward = -(beta / 2) * evidence.margin
    logit = reward[CHOSEN] - reward[REJECTED]
    return logit, reward_metrics(reward[CHOSEN], reward[REJECTED])


def positive(name: str, value: float) -> None:
    """Raises ValueError unless a hyper-parameter is a finite number above 0."""
    if not 0 < value < float("inf"):
        raise DiffalignError(f"{name} = {value}: must be a finite number above 0")


def timesteps_fit(timesteps: tuple[int, ...] | None, schedule: NoiseSchedule) -> None:
    """Raises ValueError for a timestep that the schedule does not have."""
    if timesteps is not None and max(timesteps) >= schedule.num_train_timesteps:
        raise DiffalignError(
            f"timesteps = {list(timesteps)}: the model's schedule has 0 … {schedule.num_train_timesteps - 1}; leave "
            "out the others, or null for all"
        )


def timesteps_valid(timesteps: tuple[int, ...] | None) -> None:
    """Raises ValueError for an empty or negative set of timesteps."""
    if timesteps is not None and (not timesteps or min(timesteps) < 0):
        raise DiffalignError(f"timesteps = {timesteps}: give at least one timestep, none below 0, or null for all")


def noise_rate(e: float) -> None:
    """Raises ValueError unless a share of wrong labels is in [0, 0.5)."""
    if not 0 <= e < 0.5:
        raise DiffalignError(f"label_smoothing = {e}: must be in [0, 0.5), the share of labels believed to be wrong")
