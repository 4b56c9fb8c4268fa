"""Poly-DPO (Li et al., ViPO, arXiv 2604.24953): DPO's loss and a first-order term in the confidence p.

    L = −log p + α·(1 − p),   p = σ(h),   h Diffusion-DPO's logit

The slope in h is −(1−p)·(1 + αp). α > 0 raises the share of pairs with p near ½ and above, for conflicting labels;
α < 0 lowers the slope of confident pairs, for labels that are easy to learn; α = 0 is Diffusion-DPO. Below −1 the loss
has a minimum at p = −1/α, and pairs beyond it are pulled back.

The authors released no training code. The equation is the one of their project page (liming-ai/ViPO), whose lines of
code say the same. With α = −1 the slope of a pair is (1−p)²; in float32 it rounds to 0 above h = 17, where it is below
1e-14.

By hand: E_policy = (.4, .5), E_reference = (.5, .5), β = 20, α = 2 → h = 1, p = .7311,
loss = .3133 + 2·.2689 = .8511.
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
class PolyDPO(OnSharedNoise):
    """Diffusion-DPO with a term that weighs pairs by how confident the policy is."""

    beta: float = 5000.0  # as DiffusionDPO
    alpha: float = 1.0  # α; of −1, −½, 0, ½ and 1 the best on the noisy data of the project page's ablation

    name: ClassVar[str] = "poly_dpo"
    paper: ClassVar[str] = "Li et al., ViPO: Visual Preference Optimization at Scale, arXiv 2604.24953"
    scale_field: ClassVar[str | None] = "beta"
    takes_margin: ClassVar[bool] = True
    takes_signs: ClassVar[bool] = True
    takes_safeguard: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        if not math.isfinite(self.alpha):
            raise DiffalignError(f"alpha = {self.alpha}: must be a finite number; 0 is Diffusion-DPO")

    def score(self, evidence: Evidence) -> Score:
        """−log p + α(1 − p), with p the policy's confidence in the label."""
        h, metrics = dpo_logit(evidence, self.beta)
        x = less_margin(h, evidence)
        return Score(loss=-logsigmoid(x) + self.alpha * torch.sigmoid(-x), logit=h, metrics=metrics)
