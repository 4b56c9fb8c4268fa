"""Inversion-DPO (Li et al., arXiv 2507.11554): preferences over a whole deterministic trajectory of each image.

Both images are inverted over a DDIM grid of N steps, with guidance and without grad. Step k leads from x_k to the
noisier x_{k+1} at t_k with the noise ε_k. The logit has three forms, with w_k = 1/(2ᾱ) or 1 and errors as means over
c, h, w:

    released          +(β/2)(S^c − S^r),  S = (1/N) Σ_k w_k · mean (ε_policy − ε_reference)²  at (x_k, t_k)
    released_flipped  −(β/2)(S^c − S^r)
    residual          −(β/2)(S^c − S^r),  S = (1/N) Σ_k w_k · (E_policy − E_reference)        at (x_{k+1}, t_k),
                      E the error against the noise that leads from x_{k+1} back to x_k, which is ε_k

and L = −log σ(logit). In both released forms S is quadratic in the distance between policy and reference. At the start
the loss is log 2 and the gradient exactly 0, so training begins with rounding errors. `residual` follows
Diffusion-DPO's derivation, with the inverted trajectory as the posterior sample. With one inversion step a transition
(`substeps: 1`) its target is the noise of that step, and its gradient at the start comes from that step's own error;
with more, the target is a mean noise along a finer path. docs/inversion.md has the derivation.

Differs from the released code (MIGHTYEZ/Inversion-DPO, train_ddim.py):
- the policy is called through its DDP wrapper; there it is not, so gradients are never averaged;
- every pair has its own prompt; there, all have the first prompt of the batch;
- timesteps are int64; there, bf16, which gives wrong ones;
- `grid: exact` starts at the clean image and ends at T − 1; there, at ᾱ_0 and at the sampler's first timestep;
- w_k weights errors of noise; for v- and sample-predicting models it is converted, so that the loss is the same;
- the defaults. The release's settings are `form: released`, `steps: 80`, `substeps: 1`, `guidance: 2`,
  `weighting: inverse_alpha`; docs/inversion.md has the measurements.

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
from diffalign.objectives.inpo import Grid, Inverter, inversion_valid, inverting, steps_fit
from diffalign.types import CHOSEN, REJECTED, Evidence, PairBatch, Probe, Score, Transitions

Form = Literal["residual", "released", "released_flipped"]
Weighting = Literal["inverse_alpha", "uniform"]


@dataclass(frozen=True)
class InversionDPO(Recordable):
    """Preference optimisation over DDIM-inverted trajectories."""

    beta: float = 2000.0  # the released code
    steps: int = 10  # N, transitions of a trajectory. The release: 80, with one substep
    guidance: float = 1.0  # of inversion and of both predictions; 1 needs half the forwards. The release: 2
    form: Form = "residual"
    trajectory: Inverter = "reference"  # the network that inverts; the released code uses the reference
    weighting: Weighting = "uniform"  # w = 1; inverse_alpha: 1/(2ᾱ), the released code
    normalise: bool = False  # divide w by its mean over the grid, to make β comparable with Diffusion-DPO's
    substeps: int = 8  # residual: inversion steps within each of the N transitions. 1: the release's inversion
    points_per_step: int | None = None  # points drawn of the N for each visit to a pair, unbiased for S. null: all
    points_per_forward: int | None = 1  # points of each pair in one forward with grad, which sets the memory. null: all
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
            raise DiffalignError("normalise = True: with weighting: uniform every w is 1; set weighting: inverse_alpha")
        if self.substeps < 1 or (self.substeps > 1 and self.form != "residual"):
            raise DiffalignError(f"substeps = {self.substeps}: must be at least 1, and exactly 1 unless form: residual")
        if self.points_per_step is not None and not 1 <= self.points_per_step <= self.steps:
            raise DiffalignError(
                f"points_per_step = {self.points_per_step}: allowed are 1 … steps = {self.steps}, or null"
            )
        if self.points_per_forward is not None and self.points_per_forward < 1:
            raise DiffalignError(f"points_per_forward = {self.points_per_forward}: must be at least 1, or null for all")

    @property
    def takes_safeguard(self) -> bool:  # type: ignore[override]  # of the other objectives it is a trait of the class
        """Only its residual form lowers the chosen image's error."""
        return self.form == "residual"

    @property
    def needs_uncond(self) -> bool:
        """Whether batches must contain the null prompt."""
        return self.guidance != 1.0

    @property
    def recording(self) -> dict[str, Any] | None:
        """See `Objective.recording`; training changes trajectories of the policy, so they cannot be cached."""
        if self.trajectory == "policy":
            return None
        return {"steps": self.steps, "substeps": self.substeps, "guidance": self.guidance, "grid": self.grid}

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """See `Objective.check_schedule`; also raises DiffalignError for an infinite w."""
        steps_fit(schedule, self.steps * self.substeps, "steps" if self.substeps == 1 else "steps · substeps")
        self._weights(schedule, self.levels(schedule)[1:])

    @torch.no_grad()
    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """The trajectories of both images, or the points of them that this visit draws.

        Raises DiffalignError for guidance without a null prompt, and for an infinite w at a point of the grid.
        """
        s = models.schedule
        recorded = batch.transitions
        if recorded is not None and recorded.t.ndim == 2:
            moves, answers = recorded, None
        else:  # none, or single steps of a sampler (without a point axis), which are no trajectory of these images
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
        """Whole trajectories, "side pair level c h w", the clean image first; `levels` has t of each level."""
        x0 = batch.latents.flatten(0, 1)
        whole = x0.new_empty((len(x0), self.steps + 1, *x0.shape[1:]))
        whole[:, 0] = x0
        every = torch.full((len(x0),), self.steps)
        for rise in merged(self._ascend(batch, models, every), self.substeps):
            whole[:, rise.index + 1] = rise.after
        return whole.unflatten(0, (2, -1))

    def levels(self, schedule: NoiseSchedule) -> Tensor:
        """t of each level of a trajectory, int64 [steps + 1]; −1 for the clean image."""
        high = self._grid(schedule, 1).high[0, self.substeps - 1 :: self.substeps]
        return torch.cat([high.new_full((1,), -1), high])

    def visited(self, keys: Tensor) -> Tensor:
        """The transitions of a visit, ascending, drawn without replacement: int64 [pair, point].

        Transition k leads from level k to level k + 1.
        """
        count = self.points_per_step
        if count is None or count == self.steps:
            return torch.arange(self.steps).expand(len(keys), -1)
        order = normal(keys, "points", (self.steps,)).argsort(1)
        return order[:, :count].sort(1).values

    def score(self, evidence: Evidence) -> Score:
        """−log σ of the difference of weighted means of errors, which the released forms take against the reference."""
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
        """The transitions of this visit, and the reference's predictions at their clean ends.

        The predictions are None if the policy inverts. Inversion stops after the last of these transitions.
        """
        points = self.visited(batch.keys)
        wanted = points.repeat(2, 1)  # both sides of a pair have the same points
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
        """The inversion of both images; `transitions` [(side pair)] is how many each row takes."""
        null = batch.uncond.flatten() if self.guidance != 1.0 and batch.uncond is not None else None
        inverter = predictor(inverting(models, self.trajectory), batch.cond.flatten(), self.guidance, null)
        ascent = replace(self._grid(models.schedule, len(transitions)), steps=transitions * self.substeps)
        return ascend(models.schedule, inverter, batch.latents.flatten(0, 1), ascent)

    def _grid(self, s: NoiseSchedule, rows: int) -> Ascent:
        """The whole grid for each row, where every substep is a step."""
        T, steps = s.num_train_timesteps, self.steps * self.substeps
        if self.grid == "released":
            return released_ascent(s, torch.full((rows,), T), steps)
        return exact_ascent(torch.full((rows,), T - 1), torch.full((rows,), steps))

    def _weights(self, s: NoiseSchedule, t: Tensor) -> Tensor | None:
        """w at each point, "pair point"; None if every w is 1."""
        if self.weighting == "uniform":
            return None
        return _inverse_alpha(s, t) / (_inverse_alpha(s, self.levels(s)[1:]).mean() if self.normalise else 1.0)


def _inverse_alpha(s: NoiseSchedule, t: Tensor) -> Tensor:
    """The factor 1/(2ᾱ) of squared errors of noise, converted to the network's prediction type; shaped like t.

    At the same x_t, a difference Δv of velocities is a difference √ᾱ·Δv of noise, and a difference Δx_0 of samples is a
    difference √(ᾱ/(1−ᾱ))·Δx_0 of noise. Raises DiffalignError where it is infinite.
    """
    alpha_bar = s.alpha_bar(t)
    if s.prediction_type == "v_prediction":
        return torch.full_like(alpha_bar, 0.5)
    if s.prediction_type == "sample":
        return 1 / (2 * (1 - alpha_bar))
    if bool((alpha_bar == 0).any()):
        raise DiffalignError(
            "weighting = inverse_alpha is infinite where ᾱ_t = 0 (zero terminal SNR); set weighting: uniform, or use a "
            "model that predicts v"
        )
    return 1 / (2 * alpha_bar)
