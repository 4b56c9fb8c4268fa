"""SPO, Step-by-step Preference Optimization (Liang et al., arXiv 2406.04314): preferences between two sampling steps.

A sampler with η > 0 moves x_t to x' ~ N(μ(prediction), σ²). From the same x_t (or from two with a common ancestor) it
moved to a chosen x' and to a rejected x'. The log-ratio of such a move under policy and reference is

    log r = log p_policy(x'|x_t) − log p_reference(x'|x_t),      log p the mean over c, h, w of the Gaussian's
    L     = −log σ( β·clip(log r^c) − β·clip(log r^r) ),         clip to [log(1−ε), log(1+ε)]

μ = p·x_t + q·prediction is affine in the network's prediction. With y* = (x' − p·x_t)/q, the prediction that leads
exactly to x',

    log r = w·(E_reference − E_policy),    w = q²/(2σ²),    E the mean squared error against y*

so a transition is a point with a target and a weight. For a network that predicts noise and η = 1, w =
½(SNR(t')/SNR(t) − 1): .19 to .65 on a grid of 20 steps, but 14.7 at the last step but one (t = 51), which is therefore
clipped first. With guidance in both predictions, as in sampling, the loss is the authors'.

Differs from the released code (RockeyCoss/SPO):
- the clip acts on log r: the same value, without NaN where exp overflows or log is of 0;
- where the sides share x_t, the policy is evaluated once for both (there, twice);
- the training loop clips gradients as configured (there, an exhausted iterator clips nothing).

By hand: w = 1, E_policy = (.45, .5), E_reference = (.5, .5), β = 10 → log r = (.05, 0), logit = .5, loss = log(1 +
e^−.5) = .4741. With E_policy^c = .3 instead, log r^c = .2 is clipped to log 1.1 = .0953, and its gradient is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from diffalign.engine import ddim
from diffalign.engine.measure import Models
from diffalign.engine.schedule import spread
from diffalign.errors import DiffalignError
from diffalign.objectives.base import Compared, Objective, less_margin, positive, reward_metrics
from diffalign.types import CHOSEN, REJECTED, Evidence, PairBatch, Probe, Score


@dataclass(frozen=True)
class SPO(Objective):
    """Preference optimisation of single sampling steps, on transitions that a sampler recorded."""

    beta: float = 10.0  # the released code's; log-densities are means over c·h·w
    clip: float = 0.1  # ε: the ratio of densities is clipped to [1 − ε, 1 + ε]; the released code's (`train.eps`)
    guidance: float = 5.0  # of both predictions and of the sampler that made the transitions; the released code's
    eta: float = 1.0  # share of DDPM's noise in the sampler's steps, in (0, 1]; the released code's

    name: ClassVar[str] = "spo"
    paper: ClassVar[str] = (
        "Liang et al., Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference "
        "Optimization, arXiv 2406.04314"
    )
    compares: ClassVar[Compared] = "steps"
    scale_field: ClassVar[str | None] = "beta"
    takes_margin: ClassVar[bool] = True
    takes_signs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        if not 0 < self.clip < 1:
            raise DiffalignError(f"clip = {self.clip}: must be in (0, 1); ratios are clipped to [1 − clip, 1 + clip]")
        if not 0 < self.eta <= 1:
            raise DiffalignError(f"eta = {self.eta}: must be in (0, 1]; a step without noise has no density")

    @property
    def needs_uncond(self) -> bool:
        """Whether batches must contain the null prompt."""
        return self.guidance != 1.0

    @torch.no_grad()
    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """x_t of both sides, and as targets the predictions that lead exactly to the x' that the sampler reached.

        Raises DiffalignError for a batch without transitions or with several a pair, and for a step without noise.
        """
        moves, s = batch.transitions, models.schedule
        if moves is None or moves.t.ndim != 1:
            found = "are finished images" if moves is None else f"have {moves.t.shape[1]} steps each"
            raise DiffalignError(
                f"spo compares one sampling step of each pair (PairBatch.transitions), and these pairs {found}; use a "
                "source that records its sampling, `source: {name: rollout}`"
            )
        t, t_prev = moves.t, moves.t_prev
        sigma2 = ddim.variance(s, t, t_prev, self.eta)
        if bool((sigma2 <= 0).any()):
            raise DiffalignError(
                f"no noise is added between t = {t.tolist()} and {t_prev.tolist()}, so there is no density to compare; "
                "set eta above 0 and use steps to a lower noise level"
            )
        p, q = ddim.mean_of_prediction(s, t, t_prev, self.eta)
        p_sides, q_sides = (spread(x.expand(moves.noisy.shape[:2]), moves.noisy) for x in (p, q))
        return Probe(
            xt=moves.noisy,
            t=t,
            target=(moves.clean - p_sides * moves.noisy) / q_sides,
            cond=batch.cond,
            weight=q**2 / (2 * sigma2),
            guidance=self.guidance,
            uncond=batch.uncond if self.needs_uncond else None,
        )

    def score(self, evidence: Evidence) -> Score:
        """−log σ of the difference of clipped log-ratios. Raises DiffalignError for evidence without weights."""
        if evidence.weight is None:
            raise DiffalignError("spo needs the weight w of each transition (Evidence.weight); copy it from the probe")
        weight = evidence.weight.to(evidence.margin, non_blocking=True)
        log_ratio = -weight * evidence.margin
        low, high = math.log1p(-self.clip), math.log1p(self.clip)
        reward = self.beta * log_ratio.clamp(low, high)
        clipped = ((log_ratio < low) | (log_ratio > high)).float().mean(0)
        logit = reward[CHOSEN] - reward[REJECTED]
        metrics = reward_metrics(reward[CHOSEN], reward[REJECTED])
        metrics |= {"clip_rate": clipped.detach(), "weight": weight}
        return Score(loss=-logsigmoid(less_margin(logit, evidence)), logit=logit, metrics=metrics)
