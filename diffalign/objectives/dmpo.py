"""DMPO (Li et al., arXiv 2507.07510): the reverse KL divergence from the policy's preference to the label's.

    L = KL(p ‖ q) = p·log(p/q) + (1 − p)·log((1 − p)/(1 − q)),   p = σ(h),   q = 1 − α,   h Diffusion-DPO's logit

The slope in h is p(1 − p)·(h − h*) with h* = log(q/(1 − q)), where the loss is 0. DPO's forward divergence has its
largest slope at the pairs that the policy gets most wrong; here p(1 − p) takes them out as well as those it is sure of.

The equation is that of `train_method dmpo` in SDPO's release (AIDC-AI/Diffusion-SDPO, train.py), whose authors trained
DMPO as a baseline; its own authors' code and equations could not be had. Differs from it: 1 − p is computed as σ(−h),
which keeps its digits at large h.

By hand: h = 1, α = .2 → p = .7311, L = .7311·log(.7311/.8) + .2689·log(.2689/.2) = .0138.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from diffalign.errors import DiffalignError
from diffalign.objectives.base import OnSharedNoise, dpo_logit, less_margin, positive
from diffalign.types import Evidence, Score


@dataclass(frozen=True)
class DMPO(OnSharedNoise):
    """Diffusion-DPO with the reverse KL divergence of its two probabilities."""

    beta: float = 2000.0  # as DiffusionDPO; SDPO's SD1.5 script. Its SDXL script: 6000
    alpha: float = 0.01  # α, the probability that a label is wrong; SDPO's scripts

    name: ClassVar[str] = "dmpo"
    paper: ClassVar[str] = (
        "Li et al., Divergence Minimization Preference Optimization for Diffusion Model Alignment, arXiv 2507.07510"
    )
    scale_field: ClassVar[str | None] = "beta"
    takes_margin: ClassVar[bool] = True
    takes_signs: ClassVar[bool] = True
    takes_safeguard: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        if not 1e-6 <= self.alpha < 0.5:
            raise DiffalignError(f"alpha = {self.alpha}: must be in [1e-6, 0.5), the probability of a wrong label")

    def score(self, evidence: Evidence) -> Score:
        """KL(p ‖ 1 − α), with p the policy's confidence in the label."""
        h, metrics = dpo_logit(evidence, self.beta)
        x = less_margin(h, evidence)
        right = torch.sigmoid(x) * (logsigmoid(x) - math.log1p(-self.alpha))
        wrong = torch.sigmoid(-x) * (logsigmoid(-x) - math.log(self.alpha))
        return Score(loss=right + wrong, logit=h, metrics=metrics)
