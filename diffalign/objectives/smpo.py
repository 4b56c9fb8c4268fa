"""SmPO-Diffusion (Lu et al., arXiv 2506.02698): InPO with ReNoise inversion and a smooth preference weight.

    L = −log σ( −(β/2) · W · (D^c − D^r) ),   W = γ(2p − 1) = γ·tanh((n_c − n_r)/2),   p = e^{n_c} / (e^{n_c} + e^{n_r})
    n = (score − low) / (high − low)

x_t and its target come from inversion as in InPO, without added noise. Every step uses the mean of the noise predicted
at its start and at its provisional end, both with t of the level that it leads to (ReNoise, arXiv 2403.14602). low and
high are the range of PickScore's cosine in the authors' data, before the logit scale. With them W is .15, .30, .60,
1.0 and 1.49 for gaps of .5, 1, 2, 3.3 and 5 points of PickScore as usually reported (cosine × 100). For another
scorer, or for PickScore × 100 as `pickscore` gives it, set them to its range. W < 0 where the scorer disagrees with
the label; the authors take their labels from the scorer.

Differs from the released code (JaydenLyh/SmPO, train.py) as InPO does, and W belongs to the pair; there, the
probability of the first pair weights the whole batch. `steps` is 20 here and 5 there, for the same reason as in InPO.

By hand: D = (−.1, 0), β = 20, scores with n_c − n_r = log 3 → p = .75, W = 10·.5 = 5, logit = 5·1 = 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.engine.inversion import FixedPoint, Refinement, ReNoise, arrive
from diffalign.engine.measure import Models
from diffalign.engine.predictor import predictor
from diffalign.engine.random import integers
from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError
from diffalign.objectives.base import Objective, dpo_logit, less_margin, positive
from diffalign.objectives.inpo import Grid, Inverter, ascent_to, explained, inversion_valid, inverting, steps_fit
from diffalign.types import CHOSEN, REJECTED, Evidence, PairBatch, Probe, Score


@dataclass(frozen=True)
class SmPO(Objective):
    """Preference optimisation at inverted points, each pair weighted by how much better its chosen side is."""

    beta: float = 5000.0  # as DiffusionDPO; the release uses 5000 for SDXL, 2000 for SD1.5
    gamma: float = 10.0  # γ: the largest weight
    score_low: float = 0.11543526500463486  # the score with n = 0; the release's PickScore cosine
    score_high: float = 0.28201571106910706  # the score with n = 1; the same source
    steps: int = 20  # inversion steps to t = T − 1, proportionally fewer to a smaller t. The release: 5
    refinements: int = 1  # further predictions at each step, averaged; with a tolerance, their largest number
    tolerance: float | None = None  # null: average; else iterate until the noise changes by at most this (RMS)
    grid: Grid = "exact"  # released: the authors' grid, which ends below t
    inverter: Inverter = "policy"  # whose noise predictions invert; the released code uses the current policy

    name: ClassVar[str] = "smpo"
    paper: ClassVar[str] = "Lu et al., Smoothed Preference Optimization via ReNoise Inversion, arXiv 2506.02698"
    scale_field: ClassVar[str | None] = "beta"
    takes_margin: ClassVar[bool] = True
    takes_signs: ClassVar[bool] = True
    takes_safeguard: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        positive("gamma", self.gamma)
        inversion_valid(self.steps, self.grid, self.inverter)
        if not self.score_low < self.score_high:
            raise DiffalignError(f"score_low = {self.score_low} must be below score_high = {self.score_high}")
        if self.refinements < 0:
            raise DiffalignError(f"refinements = {self.refinements}: must not be negative; 0 is plain DDIM inversion")
        if self.tolerance is not None:
            positive("tolerance", self.tolerance)

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """See `Objective.check_schedule`."""
        steps_fit(schedule, self.steps)

    @torch.no_grad()
    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """Both images inverted to the pair's t, with the pair's W as weight.

        Raises DiffalignError if the data have no scores, or a pair of the batch lacks one.
        """
        weight = self.weight(batch)
        t = integers(batch.keys, "t", 0, models.schedule.num_train_timesteps)
        ascent = ascent_to(models.schedule, t, self.steps, self.grid)
        predict = predictor(inverting(models, self.inverter), batch.cond.flatten())
        xt = arrive(models.schedule, predict, batch.latents.flatten(0, 1), ascent, self._refinement())
        return replace(explained(batch, models.schedule, t, xt), weight=weight)

    def score(self, evidence: Evidence) -> Score:
        """−log σ of W times Diffusion-DPO's logit."""
        if evidence.weight is None:
            raise DiffalignError("smpo weights every pair, and this evidence has no weight; copy it from the probe")
        logit, metrics = dpo_logit(evidence, self.beta)
        weight = evidence.weight.to(logit, non_blocking=True)
        return Score(
            loss=-logsigmoid(less_margin(weight * logit, evidence)),
            logit=weight * logit,
            metrics={**metrics, "preference_weight": weight},
        )

    def weight(self, batch: PairBatch) -> Tensor:
        """W of each pair, [pair], between −γ and γ."""
        if batch.scores is None:
            raise DiffalignError(
                "smpo weights pairs by the scores of their images, and the data have none; add columns score_0 and "
                "score_1 (Pick-a-Pic layout) or chosen_score and rejected_score from any scorer, or use inpo"
            )
        gap = batch.scores[CHOSEN] - batch.scores[REJECTED]
        if bool(gap.isnan().any()):
            missing = [batch.ids[i] if batch.ids else str(i) for i in gap.isnan().nonzero().flatten().tolist()]
            raise DiffalignError(
                f"smpo needs the scores of both images, and these pairs lack one: {', '.join(missing)}; score "
                "or remove them"
            )
        return self.gamma * torch.tanh(gap / (2 * (self.score_high - self.score_low)))

    def _refinement(self) -> Refinement | None:
        if not self.refinements:
            return None
        if self.tolerance is None:
            return ReNoise(self.refinements)
        return FixedPoint(self.tolerance, self.refinements)
