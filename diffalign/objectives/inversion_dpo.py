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
converted, so that it is the same loss.

By hand: released, w = 1, β = 20, S = (.1, 0) → logit = 10·.1 = 1, loss = log(1 + e^−1) = .3133.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.engine.inversion import Ascent, ascend, beside, exact_ascent, merged, released_ascent, transition_target
from diffalign.engine.measure import Models
from diffalign.engine.predictor import predictor
from diffalign.engine.schedule import NoiseSchedule
from diffalign.objectives.base import positive, reward_metrics
from diffalign.objectives.draws import normal
from diffalign.objectives.inpo import Grid, Inverter, inversion_valid
from diffalign.records import CHOSEN, REJECTED, Evidence, PairBatch, Probe, Score

Form = Literal["residual", "released", "released_flipped"]
Weighting = Literal["inverse_alpha", "uniform"]


@dataclass(frozen=True)
class InversionDPO:
    """Preference optimisation over DDIM-inverted trajectories."""

    beta: float = 2000.0  # the released code
    steps: int = 80  # N, points of the trajectory; the released code
    guidance: float = 2.0  # of inversion and of both predictions; the released code. 1: half the forwards
    form: Form = "residual"
    trajectory: Inverter = "reference"  # whose inversion; the released code uses the reference's
    weighting: Weighting = "inverse_alpha"  # w = 1/(2ᾱ), the released code; uniform: 1
    normalise: bool = False  # divide w by its mean over the grid, which makes β comparable with Diffusion-DPO's
    substeps: int = 1  # residual: inversion steps within each of the N transitions; 1: the release's inversion
    points_per_step: int | None = None  # of the N points, so many drawn per pair and visit: unbiased for S. null: all
    points_per_forward: int | None = 1  # memory: so many points of each pair in one forward with grad. null: all
    grid: Grid = "exact"  # released: the sampler's timesteps, from ᾱ_0

    name: ClassVar[str] = "inversion_dpo"
    paper: ClassVar[str] = (
        "Li et al., Inversion-DPO: Precise and Efficient Post-Training for Diffusion Models, arXiv 2507.11554"
    )
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        inversion_valid(self.steps, self.grid, self.trajectory)
        if self.form not in ("residual", "released", "released_flipped"):
            raise ValueError(f"form = {self.form!r}: allowed are residual, released and released_flipped")
        if self.weighting not in ("inverse_alpha", "uniform"):
            raise ValueError(f"weighting = {self.weighting!r}: allowed are inverse_alpha and uniform")
        if self.substeps < 1 or (self.substeps > 1 and self.form != "residual"):
            raise ValueError(f"substeps = {self.substeps}: allowed are 1 and, with form: residual, more")
        if self.points_per_step is not None and not 1 <= self.points_per_step <= self.steps:
            raise ValueError(f"points_per_step = {self.points_per_step}: allowed are 1 … steps = {self.steps}, or null")
        if self.points_per_forward is not None and self.points_per_forward < 1:
            raise ValueError(f"points_per_forward = {self.points_per_forward}: must be at least 1, or null for all")

    @property
    def needs_uncond(self) -> bool:
        """Whether batches must carry the null prompt."""
        return self.guidance != 1.0

    @torch.no_grad()
    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """The trajectories of both images, or the points of them that this visit asks at.

        Raises ValueError where guidance has no null prompt, or w is infinite at a point of the grid.
        """
        s, pairs = models.schedule, batch.pairs
        uncond = batch.uncond if self.guidance != 1.0 else None
        cond, null = batch.cond.flatten(), None if uncond is None else uncond.flatten()
        reference = predictor(models.reference, cond, self.guidance, null)
        policy = predictor(models.policy, cond, self.guidance, null) if self.trajectory == "policy" else None

        points = self._points(batch.keys)
        wanted = points.repeat(2, 1)  # both sides of a pair are asked at the same points
        ascent = self._ascent(s, wanted.max(1).values + 1)
        high = ascent.high[:, self.substeps - 1 :: self.substeps]  # where the transitions lead
        x0 = batch.latents.flatten(0, 1)
        xt = x0.new_empty((len(x0), points.shape[1], *x0.shape[1:]))
        target = torch.empty_like(xt)
        for rise in merged(ascend(s, policy or reference, x0, ascent), self.substeps):
            here, slot = (wanted[rise.rows] == rise.index).nonzero(as_tuple=True)
            if not len(here):
                continue
            rows, slot = beside(rise.rows[here], x0), beside(slot, x0)
            told, here = beside(rise.high[here], x0), beside(here, x0)
            if self.form == "residual":
                xt[rows, slot], target[rows, slot] = rise.after[here], transition_target(s, rise)[here]
            else:
                xt[rows, slot] = rise.before[here]
                if policy is None:
                    target[rows, slot] = rise.prediction[here]
                else:
                    target[rows, slot] = reference(rise.before[here], told, rows)
        t = high.gather(1, wanted)[:pairs]
        return Probe(
            xt=xt.unflatten(0, (2, -1)),
            t=t,
            target=target.unflatten(0, (2, -1)),
            cond=batch.cond,
            needs_reference=self.form == "residual",
            weight=self._weights(s, high[0], t),
            guidance=self.guidance,
            uncond=uncond,
            points_per_forward=self.points_per_forward,
        )

    def score(self, evidence: Evidence) -> Score:
        """−log σ of the difference of weighted sums; in the released forms the errors are the deviations d."""
        errors = evidence.margin if self.form == "residual" else evidence.policy
        if evidence.weight is not None:
            errors = evidence.weight.to(errors, non_blocking=True) * errors
        sign = 1 if self.form == "released" else -1
        reward = sign * (self.beta / 2) * errors.reshape(*errors.shape[:2], -1).mean(-1)
        logit = reward[CHOSEN] - reward[REJECTED]
        return Score(loss=-logsigmoid(logit), logit=logit, metrics=reward_metrics(reward[CHOSEN], reward[REJECTED]))

    def _points(self, keys: Tensor) -> Tensor:
        """Indices of the grid points to ask at, ascending, [pair, point]; a pair's draw is without replacement."""
        count = self.points_per_step
        if count is None or count == self.steps:
            return torch.arange(self.steps).expand(len(keys), -1)
        order = normal(keys, "points", (self.steps,)).argsort(1)
        return order[:, :count].sort(1).values

    def _ascent(self, s: NoiseSchedule, transitions: Tensor) -> Ascent:
        """The whole grid, of which each row takes its first `transitions`: none beyond the last it is asked at."""
        T, steps = s.num_train_timesteps, self.steps * self.substeps
        if self.grid == "released":
            whole = released_ascent(s, torch.full_like(transitions, T), steps)
        else:
            whole = exact_ascent(torch.full_like(transitions, T - 1), torch.full_like(transitions, steps))
        return replace(whole, steps=transitions * self.substeps)

    def _weights(self, s: NoiseSchedule, grid: Tensor, t: Tensor) -> Tensor | None:
        """w at each point, "pair point"; None where every w is 1."""
        if self.weighting == "uniform":
            return None
        return _inverse_alpha(s, t) / (_inverse_alpha(s, grid).mean() if self.normalise else 1.0)


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
        raise ValueError(
            "weighting = inverse_alpha is infinite where ᾱ_t = 0 (zero terminal SNR): set weighting: uniform, or use a "
            "model that predicts v"
        )
    return 1 / (2 * alpha_bar)
