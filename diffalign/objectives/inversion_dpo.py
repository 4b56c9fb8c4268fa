"""Inversion-DPO (Li et al., arXiv 2507.11554): preferences over a whole deterministic trajectory of each image.

Both images are inverted over a DDIM grid of N steps (guided, without grad). Step k leads from x_k to the noisier
x_{k+1} at t_k with the noise ε_k. Three forms of the logit, with w_k = 1/(2ᾱ) or 1 and mean errors over c, h, w:

    released          +(β/2)(S^c − S^r),  S = (1/N) Σ_k w_k · mean (ε_policy − ε_reference)²  at (x_k, t_k)
    released_flipped  −(β/2)(S^c − S^r)
    residual          −(β/2)(S^c − S^r),  S = (1/N) Σ_k w_k · (E_policy − E_reference)        at (x_{k+1}, t_k),
                      E the error against the noise that leads from x_{k+1} back to x_k, which is ε_k

and L = −log σ(logit). In both released forms S is quadratic in the policy's distance from its reference, so that at
the start loss and gradient are log 2 and exactly 0: training begins with rounding noise. `residual` is Diffusion-DPO's
argument with the inverted trajectory as posterior sample. With one inversion step for each transition (`substeps: 1`)
its target, and so its gradient at the start, is that step's own error; with more, it is the mean noise along a finer
path. docs/inversion.md derives all of this.

Differs from the released code (MIGHTYEZ/Inversion-DPO, train_ddim.py): the policy is called through its DDP wrapper
(there, past it, so that gradients are never averaged); every pair has its own prompt (there, the batch's first);
timesteps are int64 (there, bf16, which hits wrong ones); `grid: exact` starts at the clean image and ends at T − 1
(there, at ᾱ_0 and at the sampler's first timestep). w_k weighs errors of noise; for v- and sample models it is
converted, so that it is the same loss. The defaults are not the release's settings, which are `form: released`,
`steps: 80`, `substeps: 1`, `guidance: 2`, `weighting: inverse_alpha`: docs/inversion.md has the measurements.

By hand: released, w = 1, β = 20, S = (.1, 0) → logit = 10·.1 = 1, loss = log(1 + e^−1) = .3133.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.engine.inversion import (
    Ascent,
    Rise,
    ascend,
    beside,
    exact_ascent,
    merged,
    released_ascent,
    transition_target,
)
from diffalign.engine.measure import Models, predictions
from diffalign.engine.predictor import predictor
from diffalign.engine.random import normal
from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError
from diffalign.objectives.base import Recordable, less_margin, positive, reward_metrics
from diffalign.objectives.inpo import Grid, Inverter, inversion_valid, steps_fit
from diffalign.types import CHOSEN, REJECTED, Evidence, PairBatch, Probe, Score, Transitions

Form = Literal["residual", "released", "released_flipped"]
Weighting = Literal["inverse_alpha", "uniform"]


@dataclass(frozen=True)
class InversionDPO(Recordable):
    """Preference optimisation over DDIM-inverted trajectories."""

    beta: float = 2000.0  # the released code
    steps: int = 10  # N, points of the trajectory. The release: 80, with one substep
    guidance: float = 1.0  # of inversion and of both predictions; 1: half the forwards. The release: 2
    form: Form = "residual"
    trajectory: Inverter = "reference"  # whose inversion; the released code uses the reference's
    weighting: Weighting = "uniform"  # w = 1; inverse_alpha: 1/(2ᾱ), the released code
    normalise: bool = False  # divide w by its mean over the grid, which makes β comparable with Diffusion-DPO's
    substeps: int = 8  # residual: inversion steps within each of the N transitions. 1: the release's inversion
    points_per_step: int | None = None  # of the N points, so many drawn per pair and visit: unbiased for S. null: all
    points_per_forward: int | None = 1  # memory: so many points of each pair in one forward with grad. null: all
    grid: Grid = "exact"  # released: the sampler's timesteps, from ᾱ_0

    name: ClassVar[str] = "inversion_dpo"
    paper: ClassVar[str] = (
        "Li et al., Inversion-DPO: Precise and Efficient Post-Training for Diffusion Models, arXiv 2507.11554"
    )
    scale_field: ClassVar[str | None] = "beta"
    takes_margin: ClassVar[bool] = True
    takes_signs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        inversion_valid(self.steps, self.grid, self.trajectory)
        if self.form not in ("residual", "released", "released_flipped"):
            raise DiffalignError(f"form = {self.form!r}: allowed are residual, released and released_flipped")
        if self.weighting not in ("inverse_alpha", "uniform"):
            raise DiffalignError(f"weighting = {self.weighting!r}: allowed are inverse_alpha and uniform")
        if self.normalise and self.weighting == "uniform":
            raise DiffalignError("normalise = True: with weighting: uniform every w = 1 already; set inverse_alpha")
        if self.substeps < 1 or (self.substeps > 1 and self.form != "residual"):
            raise DiffalignError(f"substeps = {self.substeps}: allowed are 1 and, with form: residual alone, more")
        if self.points_per_step is not None and not 1 <= self.points_per_step <= self.steps:
            raise DiffalignError(
                f"points_per_step = {self.points_per_step}: allowed are 1 … steps = {self.steps}, or null"
            )
        if self.points_per_forward is not None and self.points_per_forward < 1:
            raise DiffalignError(f"points_per_forward = {self.points_per_forward}: must be at least 1, or null for all")

    @property
    def needs_uncond(self) -> bool:
        """Whether batches must carry the null prompt."""
        return self.guidance != 1.0

    @property
    def recording(self) -> dict[str, Any] | None:
        """See `Objective.recording`: only the reference's trajectories stay as they are."""
        if self.trajectory == "policy":
            return None
        return {"steps": self.steps, "substeps": self.substeps, "guidance": self.guidance, "grid": self.grid}

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """See `Objective.check_schedule`; raises as `probe` does for an infinite w, too."""
        steps_fit(schedule, self.steps * self.substeps, "steps" if self.substeps == 1 else "steps · substeps")
        self._weights(schedule, self.levels(schedule)[1:])

    @torch.no_grad()
    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """The trajectories of both images, or the points of them that this visit asks at.

        Raises ValueError where guidance has no null prompt, or w is infinite at a point of the grid.
        """
        s = models.schedule
        recorded = batch.transitions
        if recorded is not None and recorded.t.ndim == 2:
            moves, answers = recorded, None
        else:  # none, or without a point axis: single steps of a sampler, no path of these images
            moves, answers = self._follow(batch, models)
        t = moves.t.repeat(2, 1).unflatten(0, (2, -1))
        probe = Probe(
            xt=moves.noisy if self.form == "residual" else moves.clean,
            t=moves.t,
            target=moves.clean,  # replaced below
            cond=batch.cond,
            needs_reference=self.form == "residual",
            weight=self._weights(s, moves.t),
            guidance=self.guidance,
            uncond=batch.uncond if self.guidance != 1.0 else None,
            points_per_forward=self.points_per_forward,
        )
        if self.form == "residual":
            clean = torch.where(moves.t_prev < 0, self._grid(s, 1).clean, s.alpha_bar(moves.t_prev)).expand(t.shape)
            answers = transition_target(s, moves.clean, moves.noisy, clean, s.alpha_bar(t), t)
        elif answers is None:
            answers = predictions(models.reference, probe)
        return replace(probe, target=answers)

    @torch.no_grad()
    def record(self, batch: PairBatch, models: Models) -> Tensor:
        """Whole trajectories, "side pair level c h w" on `levels`: the clean image first."""
        x0 = batch.latents.flatten(0, 1)
        whole = x0.new_empty((len(x0), self.steps + 1, *x0.shape[1:]))
        whole[:, 0] = x0
        every = torch.full((len(x0),), self.steps)
        for rise in merged(self._ascend(batch, models, every), self.substeps):
            whole[:, rise.index + 1] = rise.after
        return whole.unflatten(0, (2, -1))

    def levels(self, schedule: NoiseSchedule) -> Tensor:
        """t of each level of a trajectory, int64 [steps + 1]; −1 is the clean image."""
        high = self._grid(schedule, 1).high[0, self.substeps - 1 :: self.substeps]
        return torch.cat([high.new_full((1,), -1), high])

    def visited(self, keys: Tensor) -> Tensor:
        """Which transitions a visit asks at, ascending, int64 [pair, point]; a pair's draw is without replacement.

        Transition k leads from level k to level k + 1.
        """
        count = self.points_per_step
        if count is None or count == self.steps:
            return torch.arange(self.steps).expand(len(keys), -1)
        order = normal(keys, "points", (self.steps,)).argsort(1)
        return order[:, :count].sort(1).values

    def score(self, evidence: Evidence) -> Score:
        """−log σ of the difference of weighted sums; in the released forms the errors are the deviations d."""
        errors = evidence.margin if self.form == "residual" else evidence.policy
        if evidence.weight is not None:
            errors = evidence.weight.to(errors, non_blocking=True) * errors
        sign = 1 if self.form == "released" else -1
        reward = sign * (self.beta / 2) * errors.reshape(*errors.shape[:2], -1).mean(-1)
        logit = reward[CHOSEN] - reward[REJECTED]
        return Score(
            loss=-logsigmoid(less_margin(logit, evidence)),
            logit=logit,
            metrics=reward_metrics(reward[CHOSEN], reward[REJECTED]),
        )

    def _follow(self, batch: PairBatch, models: Models) -> tuple[Transitions, Tensor | None]:
        """The transitions that this visit asks at, and the reference's answers at their clean ends.

        No answers where the policy made the trajectory. No step is taken beyond the last one that is asked at.
        """
        points = self.visited(batch.keys)
        wanted = points.repeat(2, 1)  # both sides of a pair are asked at the same points
        x0 = batch.latents.flatten(0, 1)
        clean = x0.new_empty((len(x0), points.shape[1], *x0.shape[1:]))
        noisy, answers = torch.empty_like(clean), torch.empty_like(clean)
        for rise in merged(self._ascend(batch, models, wanted.max(1).values + 1), self.substeps):
            here, slot = (wanted[rise.rows] == rise.index).nonzero(as_tuple=True)
            if not len(here):
                continue
            rows, slot, here = beside(rise.rows[here], x0), beside(slot, x0), beside(here, x0)
            clean[rows, slot], noisy[rows, slot] = rise.before[here], rise.after[here]
            answers[rows, slot] = rise.prediction[here]
        levels = self.levels(models.schedule)
        sides = (2, -1)
        moves = Transitions(noisy.unflatten(0, sides), clean.unflatten(0, sides), levels[points + 1], levels[points])
        return moves, answers.unflatten(0, sides) if self.trajectory == "reference" else None

    def _ascend(self, batch: PairBatch, models: Models, transitions: Tensor) -> Iterator[Rise]:
        """Both images on their way up, each row for so many transitions."""
        null = batch.uncond.flatten() if self.guidance != 1.0 and batch.uncond is not None else None
        network = models.policy if self.trajectory == "policy" else models.reference
        inverter = predictor(network, batch.cond.flatten(), self.guidance, null)
        ascent = replace(self._grid(models.schedule, len(transitions)), steps=transitions * self.substeps)
        return ascend(models.schedule, inverter, batch.latents.flatten(0, 1), ascent)

    def _grid(self, s: NoiseSchedule, rows: int) -> Ascent:
        """The whole grid, every substep a step of its own, for each of the rows."""
        T, steps = s.num_train_timesteps, self.steps * self.substeps
        if self.grid == "released":
            return released_ascent(s, torch.full((rows,), T), steps)
        return exact_ascent(torch.full((rows,), T - 1), torch.full((rows,), steps))

    def _weights(self, s: NoiseSchedule, t: Tensor) -> Tensor | None:
        """w at each point, "pair point"; None where every w is 1."""
        if self.weighting == "uniform":
            return None
        return _inverse_alpha(s, t) / (_inverse_alpha(s, self.levels(s)[1:]).mean() if self.normalise else 1.0)


def _inverse_alpha(s: NoiseSchedule, t: Tensor) -> Tensor:
    """1/(2ᾱ) for errors of noise, as the factor of errors in the network's own prediction space; shaped like t.

    A difference Δv of velocities is a difference √ᾱ·Δv of noise at the same x_t, one of samples √(ᾱ/(1−ᾱ))·Δx_0.
    Raises ValueError where it is infinite.
    """
    alpha_bar = s.alpha_bar(t)
    if s.prediction_type == "v_prediction":
        return torch.full_like(alpha_bar, 0.5)
    if s.prediction_type == "sample":
        return 1 / (2 * (1 - alpha_bar))
    if bool((alpha_bar == 0).any()):
        raise DiffalignError(
            "weighting = inverse_alpha is infinite where ᾱ_t = 0 (zero terminal SNR): set weighting: uniform, or use a "
            "model that predicts v"
        )
    return 1 / (2 * alpha_bar)
