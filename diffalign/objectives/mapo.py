"""MaPO (Hong et al., arXiv 2406.06424): margin-aware preference optimisation without a reference model.

    q(E) = κE / (e^{κE} − 1)
    L    = E^c − β · log σ( T · (q(E^c) − q(E^r)) )

q falls from 1 at E = 0 towards 0: a bounded replacement for the likelihood of a sample with error E. The sides share t
and ε as in Diffusion-DPO. The form is that of the released code (mapo-t2i/mapo, utils.py). The implicit reward
reported here is T·q(E), so that the reward margin is the logit.

Differs from the released code: q is computed as κE·e^{−κE}/(1 − e^{−κE}) with expm1, which does not overflow far from
0, and as a series near 0, where the slope of the closed form loses precision.

By hand: E = (0, ∞), T = 1, β = 1 → q = (1, 0), L = 0 + log(1 + e^−1) = .3133.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import OnSharedNoise, less_margin, positive, reward_metrics
from diffalign.types import CHOSEN, REJECTED, Evidence, Score

SERIES_BELOW = 0.25  # above it the closed form's slope loses less than a digit; below it the series is exact
# x/(e^x − 1) = Σ B_n x^n / n!, the Bernoulli numbers up to x¹⁰; the next term is 3e-17 at x = .25
SERIES = (1.0, -1 / 2, 1 / 12, 0.0, -1 / 720, 0.0, 1 / 30240, 0.0, -1 / 1209600, 0.0, 1 / 47900160)


@dataclass(frozen=True)
class MaPO(OnSharedNoise):
    """Denoising loss on the chosen side plus a margin between bounded likelihoods, without a reference."""

    beta: float = 0.1  # weight of the margin term
    snr: float = 0.5  # κ, called `snr` in the released code
    num_train_timesteps: int = 1000  # T, the scale of the logit; the released code uses the schedule's length

    name: ClassVar[str] = "mapo"
    paper: ClassVar[str] = (
        "Hong et al., Margin-aware Preference Optimization without Reference (MaPO), arXiv 2406.06424"
    )
    scale_field: ClassVar[str | None] = "num_train_timesteps"
    needs_reference: ClassVar[bool] = False
    takes_margin: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        positive("snr", self.snr)
        positive("num_train_timesteps", self.num_train_timesteps)

    def score(self, evidence: Evidence) -> Score:
        """The error of the chosen side plus β times the margin term."""
        reward = self.num_train_timesteps * bounded_likelihood(self.snr * evidence.policy)
        logit = reward[CHOSEN] - reward[REJECTED]
        margin_loss = -logsigmoid(less_margin(logit, evidence))
        return Score(
            loss=evidence.policy[CHOSEN] + self.beta * margin_loss,
            logit=logit,
            metrics={
                **reward_metrics(reward[CHOSEN], reward[REJECTED]),
                "loss/denoising": evidence.policy[CHOSEN].detach(),
                "loss/margin": margin_loss.detach(),
            },
        )


def bounded_likelihood(x: Tensor) -> Tensor:
    """x / (e^x − 1) for x ≥ 0, with its limit 1 at x = 0 and a finite gradient everywhere."""
    small = x < SERIES_BELOW
    safe = torch.where(small, torch.ones_like(x), x)
    series = torch.zeros_like(x)
    for coefficient in reversed(SERIES):
        series = series * torch.where(small, x, 0.0) + coefficient
    return torch.where(small, series, safe * torch.exp(-safe) / -torch.expm1(-safe))
