"""An objective with modifiers: terms that many papers add to any preference loss, each off unless it is set.

    loss(pair) = w(t) · L( E_policy, E_reference ) + a · E_policy^c + d · |policy − reference|²^c

    safeguard_mu      the gradient of the rejected side is multiplied by
                      λ = clip( (1 − μ) |e_c|² / <e_c, e_r>, 0, 1 ) where <e_c, e_r> > 0, else by 1
                      (Diffusion-SDPO, Fu et al., arXiv 2511.03317)
    sft_weight        a: the denoising loss of the chosen image
    distance_weight   d: the squared distance of policy and reference at the chosen image
    snr_gamma         w(t): Min-SNR (arXiv 2303.09556)
    loss_power        w(t) ∝ ((t + 1)/T)^power with mean 1 over all t
    beta_power        β(t) = β · ((t + 1)/T)^power with mean β over all t
    logit_std, logit_mean, sampling_power: the density of t (`timesteps.py`)

e is the policy's prediction less its target. A step against A − λ B, with A and B the squared errors of the sides,
changes A to first order by −|e_c|² + λ <e_c, e_r> in the space of predictions: with this λ by no more than −μ |e_c|².
So the chosen image's error does not rise on the rejected image's account.

Differs from SDPO's released code (AIDC-AI/Diffusion-SDPO, train.py): there one λ serves the micro-batch of a process,
from products over all of its pairs; here each pair has its own, so that a batch remains the mean of its pairs.

By hand: e_c = (1, 0), e_r = (2, 1), μ = .5 → |e_c|² = 1, <e_c, e_r> = 2, λ = .5/2 = .25.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.engine.measure import Models
from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError
from diffalign.objectives.base import Objective, SharedNoise, shared_points
from diffalign.objectives.timesteps import TimestepDensity, min_snr, power_weight
from diffalign.types import CHOSEN, REJECTED, Evidence, PairBatch, Probe, Score

LARGEST_POWER = 100.0  # of (t + 1)/T: 1000 timesteps to this power are in the range of float64


@dataclass(frozen=True)
class Modifiers:
    """The settings of `Modified`, each off by default."""

    safeguard_mu: float | None = None  # μ of SDPO, in [0, 1]; the release: .9 (SD1.5), .6 (SDXL). null: no safeguard
    sft_weight: float = 0.0  # of the chosen image's denoising loss, in units of the objective's loss
    distance_weight: float = 0.0  # of the squared distance to the reference at the chosen image
    snr_gamma: float | None = None  # γ; 5 in the paper. null: no Min-SNR weight
    loss_power: float = 0.0  # above 0: high noise counts more
    beta_power: float = 0.0  # above 0: β is larger at high noise
    logit_std: float | None = None  # of a logit-normal density of t; null: none
    logit_mean: float = 0.0  # its mean; above 0: more noise
    sampling_power: float = 0.0  # of a density of t ∝ t^power; above 0: more noise

    def __post_init__(self) -> None:
        _check_values(self)

    @property
    def changes(self) -> dict[str, Any]:
        """Those that are set, by name."""
        given = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {name: value for name, (value, default) in given.items() if value != default}

    @property
    def density(self) -> TimestepDensity | None:
        """Of t; None: the objective's own."""
        if self.logit_std is None and not self.sampling_power:
            return None
        return TimestepDensity(self.sampling_power, self.logit_mean, self.logit_std)


@dataclass(frozen=True)
class Modified:
    """An objective and its modifiers; in every other respect it is the objective. `modified` makes one."""

    objective: Objective
    modifiers: Modifiers

    def __post_init__(self) -> None:
        _check_fits(self.modifiers, self.objective)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "objective" not in self.__dict__:  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.objective, name)

    @property
    def needs_reference(self) -> bool:
        """Also for the distance to it."""
        return self.objective.needs_reference or self.needs_distance

    @property
    def needs_distance(self) -> bool:
        """For the term of the distance, or as the objective."""
        return self.objective.needs_distance or self.modifiers.distance_weight > 0

    @property
    def needs_alignment(self) -> bool:
        """For the safeguard, or as the objective."""
        return self.objective.needs_alignment or self.modifiers.safeguard_mu is not None

    @property
    def takes_signs(self) -> bool:
        """With a safeguard or a term of the chosen image the sides have roles that a mask cannot swap."""
        sided = self.modifiers.safeguard_mu is not None or self.modifiers.sft_weight or self.modifiers.distance_weight
        return self.objective.takes_signs and not sided

    @property
    def points(self) -> SharedNoise | None:
        """The settings of its points; None where the objective finds them in another way."""
        own = shared_points(self.objective)
        return (
            None if own is None else replace(own, needs_reference=self.needs_reference, density=self.modifiers.density)
        )

    @property
    def drawn(self) -> dict[str, Any] | None:
        """See `Objective.drawn`."""
        return self.objective.drawn if self.points is None else self.points.drawn

    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """The objective's points, at timesteps of the chosen density."""
        points = self.points
        probe = self.objective.probe(batch, models) if points is None else points(batch, models.schedule)
        return self.weigh(probe, models.schedule)

    def weigh(self, probe: Probe, schedule: NoiseSchedule) -> Probe:
        """A probe with the weights of its timesteps, for `score`."""
        weight = None if self.modifiers.snr_gamma is None else min_snr(schedule, probe.t, self.modifiers.snr_gamma)
        if self.modifiers.loss_power:
            power = power_weight(schedule, probe.t, self.modifiers.loss_power)
            weight = power if weight is None else weight * power
        scale = power_weight(schedule, probe.t, self.modifiers.beta_power) if self.modifiers.beta_power else None
        return probe if weight is None and scale is None else replace(probe, weight=weight, scale=scale)

    def score(self, evidence: Evidence) -> Score:
        """The objective's score of the evidence, and the terms beside it."""
        seen, metrics = evidence, {}
        if self.modifiers.safeguard_mu is not None:
            seen, kept = safeguarded(seen, self.modifiers.safeguard_mu)
            metrics["safeguard"] = kept
        if seen.scale is not None:
            scale = seen.scale.to(seen.policy)
            reference = None if seen.reference is None else seen.reference * scale
            seen = replace(seen, policy=seen.policy * scale, reference=reference)
        weight = evidence.weight if self.modifiers.snr_gamma is not None or self.modifiers.loss_power else None
        score = self.objective.score(seen if weight is None else replace(seen, weight=None))
        loss = score.loss if weight is None else score.loss * weight.to(score.loss)
        for name, share, term in (
            ("loss/sft", self.modifiers.sft_weight, evidence.policy),
            ("loss/distance", self.modifiers.distance_weight, evidence.distance),
        ):
            if share:
                chosen = _of_pair(_present(term, name)[CHOSEN])
                loss, metrics[name] = loss + share * chosen, chosen.detach()
        return replace(score, loss=loss, metrics={**score.metrics, **metrics})


MODIFIERS: dict[str, Any] = {f.name: f.default for f in fields(Modifiers)}


def safeguarded(evidence: Evidence, mu: float) -> tuple[Evidence, Tensor]:
    """The evidence with λ on the gradient of the rejected side, its values unchanged, and λ of each pair, [pair].

    At several points of a pair each has its own λ; what is returned is their mean.
    """
    products = _present(evidence.alignment, "safeguard_mu")
    chosen, both = products[CHOSEN], products[REJECTED]
    most = (1 - mu) * chosen / torch.where(both > 0, both, 1.0)
    kept = torch.where(both > 0, most.clamp(0, 1), 1.0)
    rejected = evidence.policy[REJECTED]
    rejected = rejected.detach() + kept * (rejected - rejected.detach())
    return replace(evidence, policy=torch.stack([evidence.policy[CHOSEN], rejected])), _of_pair(kept)


def modified(objective: Objective, **modifiers: Any) -> Any:
    """The objective with modifiers; the objective itself where none is set. Raises DiffalignError."""
    given = Modifiers(**modifiers)
    return Modified(objective, given) if given.changes else objective


def plain_objective(objective: Any) -> Any:
    """The objective without its modifiers."""
    return objective.objective if isinstance(objective, Modified) else objective


def _present(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise DiffalignError(
            f"{name}: this evidence was measured without what it needs; measure at points from `objectives.base.ask`"
        )
    return value


def _of_pair(x: Tensor) -> Tensor:
    """The mean over the points of each pair."""
    return x if x.ndim == 1 else x.flatten(1).mean(1)


def _check_values(m: Modifiers) -> None:
    """Raises DiffalignError for modifiers outside their range."""
    if m.safeguard_mu is not None and not 0 <= m.safeguard_mu <= 1:
        raise DiffalignError(f"safeguard_mu = {m.safeguard_mu}: must be in [0, 1], or null for no safeguard")
    for name in ("sft_weight", "distance_weight"):
        if not 0 <= getattr(m, name) < math.inf:
            raise DiffalignError(f"{name} = {getattr(m, name)}: must be a finite number of at least 0; 0: no term")
    for name in ("snr_gamma", "logit_std"):
        value = getattr(m, name)
        if value is not None and not 0 < value < math.inf:
            raise DiffalignError(f"{name} = {value}: must be a finite number above 0, or null")
    for name in ("loss_power", "beta_power"):
        if not abs(getattr(m, name)) <= LARGEST_POWER:
            raise DiffalignError(f"{name} = {getattr(m, name)}: must be in [-{LARGEST_POWER:g}, {LARGEST_POWER:g}]")
    if not -1 < m.sampling_power <= LARGEST_POWER:
        raise DiffalignError(f"sampling_power = {m.sampling_power}: must be above -1 and at most {LARGEST_POWER:g}")
    if m.logit_std is None and m.logit_mean:
        raise DiffalignError(f"logit_mean = {m.logit_mean}: needs logit_std, e.g. 1.0")
    if m.logit_std is not None and m.sampling_power:
        raise DiffalignError("logit_std and sampling_power: t has one density; set one of them")


def _check_fits(m: Modifiers, objective: Objective) -> None:
    """Raises DiffalignError for modifiers that an objective does not take."""
    name = objective.name
    if isinstance(objective, Modified):
        raise DiffalignError("an objective is modified once; give all modifiers together")
    if m.safeguard_mu is not None and not objective.takes_safeguard:
        raise DiffalignError(
            f"safeguard_mu: {name} with these settings is not a loss of the difference of the sides' errors, for which "
            "the bound is derived; remove it, or use an objective like dpo"
        )
    drawn = ("sft_weight", "snr_gamma", "loss_power", "beta_power", "logit_std", "sampling_power")
    timed = [n for n in drawn if n in m.changes]
    if timed and shared_points(objective) is None:
        raise DiffalignError(
            f"{', '.join(timed)}: {name} does not draw one timestep and noise for each pair; remove it, or "
            "use an objective that does, like dpo"
        )
    if m.sft_weight and objective.compares in ("chosen images", "graded images"):
        raise DiffalignError(f"sft_weight: the loss of {name} is that of the chosen images already; remove it")
    if m.beta_power and not (objective.scale_field == "beta" and objective.takes_margin and objective.needs_reference):
        raise DiffalignError(f"beta_power: {name} has no beta in front of log-ratios; use loss_power")
