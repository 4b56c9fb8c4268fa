"""Diffusion-KTO (Li et al., arXiv 2404.04465): each image is good or bad by itself, with a utility that saturates.

    L = mean over both images of  λ_y · (1 − σ( y · β · (g − kl) )),   g = E_reference − E_policy
    y = +1 for the chosen image, −1 for the rejected one
    kl = max(0, mean of g over the pair's two images), without gradient

Images with a very high or very low utility have a small slope, so that no single image dominates. A policy equal to its
reference has a loss of (λ_desirable + λ_undesirable)/4, not log 2.

Differs from the released code (jacklishufan/diffusion-kto). There, the images of a batch are drawn independently, 80 %
of them desirable, each with its own t and ε, and kl is the mean over the batch of all processes. Here, both images of
a pair are used and share t and ε; λ_desirable 1.6 and λ_undesirable 0.4 give the weights of that share of 80 %. A mean
over the batch would make the loss of a pair depend on the other pairs and on the number of processes. So kl is what
the released code computes for a batch of the pair's two images: the same mean before it is clipped at 0, with more
variance. Where kl > 0, the pair is compared as in DPO: g^c − kl = (g^c − g^r)/2 = −(g^r − kl). `reference_point: zero`
sets kl = 0; then the loss of an image depends on no other image.

By hand: E_policy = (.4, .6), E_reference = (.5, .5), β = 10 → g = (.1, −.1), kl = 0, both arguments of σ are 1,
loss = 1 − σ(1) = .2689. E_policy = (.3, .5): g = (.2, 0), kl = .1, the arguments are 1 and 1 again: the same loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.errors import DiffalignError
from diffalign.objectives.base import OnSharedNoise, positive, reward_metrics
from diffalign.types import CHOSEN, REJECTED, Evidence, Score

REFERENCE_POINTS = ("pair", "zero")


@dataclass(frozen=True)
class KTO(OnSharedNoise):
    """Saturating utility of each image compared with the reference, not with the other image."""

    beta: float = 1000.0  # errors are means over c·h·w; the released code's default
    lambda_desirable: float = 1.0  # weight of chosen images; the released code's lambda_d_kto
    lambda_undesirable: float = 1.0  # weight of rejected images; the released code's lambda_u_kto
    reference_point: Literal["pair", "zero"] = "pair"  # kl: from the errors of the pair, or 0

    name: ClassVar[str] = "kto"
    paper: ClassVar[str] = (
        "Li et al., Aligning Diffusion Models by Optimizing Human Utility (Diffusion-KTO), arXiv 2404.04465"
    )
    scale_field: ClassVar[str | None] = "beta"
    scale_spread: ClassVar[float] = 2.0  # the arguments of σ are half the difference of rewards

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        positive("lambda_desirable", self.lambda_desirable)
        positive("lambda_undesirable", self.lambda_undesirable)
        if self.reference_point not in REFERENCE_POINTS:
            raise DiffalignError(f"reference_point = {self.reference_point!r}; allowed: {', '.join(REFERENCE_POINTS)}")

    def score(self, evidence: Evidence) -> Score:
        """Mean of the losses of both images; the logit, for metrics alone, is the difference of their rewards β·g."""
        g = -evidence.margin
        kl = self._reference_point(g.detach())
        chosen, rejected = self.beta * (g[CHOSEN] - kl), -self.beta * (g[REJECTED] - kl)
        # 1 − σ(z) = σ(−z) is precise for large z, and through its logarithm its slope is precise on both sides
        desirable = self.lambda_desirable * logsigmoid(-chosen).exp()
        undesirable = self.lambda_undesirable * logsigmoid(-rejected).exp()
        reward = self.beta * g
        return Score(
            loss=(desirable + undesirable) / 2,
            logit=reward[CHOSEN] - reward[REJECTED],
            metrics={**reward_metrics(reward[CHOSEN], reward[REJECTED]), "reference_point": self.beta * kl},
        )

    def _reference_point(self, g: Tensor) -> Tensor:
        """kl of each pair."""
        if self.reference_point == "zero":
            return torch.zeros_like(g[CHOSEN])
        return g.mean(0).clamp(min=0)
