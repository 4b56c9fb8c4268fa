"""f-DPO (Wang et al., arXiv 2309.16240): DPO under another divergence from the reference than the reverse KL.

    L = −log σ( p · (g(u^c) − g(u^r)) ),   u = −(β/2)·D / p   the log-ratio of policy to reference

    reverse_kl   g(u) = u                        Diffusion-DPO, to the last bit
    forward_kl   g(u) = 1 − e^{−u}
    js           g(u) = log( 2e^u / (1 + e^u) )
    alpha        g(u) = (1 − e^{−αu}) / α        α → 0: reverse_kl; α → 1: forward_kl

g is f' of the paper's table at the ratio e^u, up to a constant that the difference removes: g(0) = 0. p is the paper's
β, the weight of the divergence; β here is Diffusion-DPO's, which is that weight times the scale of the log-ratio, so
that at u = 0 the slopes are DPO's (js: half of them). All links but the reverse KL are bounded above, by 1, log 2 and
1/α: a chosen image is not rewarded for ever. Below, forward_kl and alpha grow exponentially. Their exponents are
limited to `max_exponent`, beyond which e^x goes on as its tangent: a plain clamp would take the gradient from just
those images that the policy has lost most. Links and slopes are those of the formulas in float32 as well.

Stated for language models; that −(β/2)D/p takes the place of the log-ratio is our reading, as it is Diffusion-DPO's.

By hand: E_policy = (.4, .6), E_reference = (.5, .5), β = 20, p = 1 → u = (1, −1).
    reverse_kl  logit 2                      forward_kl  (1 − e^−1) − (1 − e) = 2.3504
    js          log σ(1) − log σ(−1) = 1     alpha .5    2·(e^.5 − e^−.5) = 2.0844
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from diffalign.errors import DiffalignError
from diffalign.objectives.base import OnSharedNoise, less_margin, positive, reward_metrics
from diffalign.types import CHOSEN, REJECTED, Evidence, Score

MAX_EXPONENT = 40.0  # e^40 · 1e10 is far from float32's largest number, which is e^88.7
LINKS = ("reverse_kl", "forward_kl", "js", "alpha")


@dataclass(frozen=True)
class FDPO(OnSharedNoise):
    """Diffusion-DPO with the link of an f-divergence."""

    beta: float = 5000.0  # as DiffusionDPO
    link: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "js"  # which divergence; our choice, between the two KLs
    alpha: float | None = None  # α in (0, 1), for link alpha alone
    penalty: float = 1.0  # p, the paper's β: small means large log-ratios, which the links bend; our choice
    max_exponent: float = 20.0  # of forward_kl and alpha; our choice

    name: ClassVar[str] = "f_dpo"
    paper: ClassVar[str] = (
        "Wang et al., Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence "
        "Constraints, arXiv 2309.16240"
    )
    scale_field: ClassVar[str | None] = "beta"
    takes_margin: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        positive("penalty", self.penalty)
        positive("max_exponent", self.max_exponent)
        if self.max_exponent > MAX_EXPONENT:
            raise DiffalignError(
                f"max_exponent = {self.max_exponent}: at most {MAX_EXPONENT:g}; beyond, float32 losses overflow"
            )
        if self.link not in LINKS:
            raise DiffalignError(f"link = {self.link!r}; allowed: {', '.join(LINKS)}")
        if self.link != "alpha" and self.alpha is not None:
            raise DiffalignError(f"alpha = {self.alpha}: only link alpha has such a setting, and link is {self.link}")
        if self.link == "alpha" and (self.alpha is None or not 0 < self.alpha < 1):
            raise DiffalignError(
                f"alpha = {self.alpha}: link alpha needs it in (0, 1); its ends are the links reverse_kl and forward_kl"
            )

    def score(self, evidence: Evidence) -> Score:
        """−log σ of the difference of the linked log-ratios; p·g is the implicit reward."""
        reward = self._reward(-(self.beta / 2) * evidence.margin)
        logit = reward[CHOSEN] - reward[REJECTED]
        return Score(
            loss=-logsigmoid(less_margin(logit, evidence)),
            logit=logit,
            metrics=reward_metrics(reward[CHOSEN], reward[REJECTED]),
        )

    def _reward(self, h: Tensor) -> Tensor:
        """p · g(h / p)."""
        p = self.penalty
        if self.link == "reverse_kl":
            return h
        if self.link == "js":
            return p * js_link(h / p)
        alpha = 1.0 if self.alpha is None else self.alpha  # forward_kl is alpha's end
        return -p * tangent_expm1(-alpha * h / p, self.max_exponent) / alpha


def js_link(u: Tensor) -> Tensor:
    """log(2e^u / (1 + e^u)), with all its digits near u = 0, where it is u/2, and no overflow far from it."""
    above = -torch.log1p(expm1(-u.clamp(min=0)) / 2)
    below = u - torch.log1p(expm1(u.clamp(max=0)) / 2)
    return torch.where(u < 0, below, above)


def tangent_expm1(x: Tensor, limit: float) -> Tensor:
    """e^x − 1 up to x = limit, and its tangent there from then on: finite, with a slope that never vanishes.

    Each x has a slope from one of the two terms alone. Two terms of e^limit that cancel would swallow it in float32.
    """
    return expm1(x.clamp(max=limit)) + math.exp(limit) * relu(x - limit)


def expm1(x: Tensor) -> Tensor:
    """e^x − 1 whose slope keeps its digits: torch.expm1's is its result + 1, in float32 0 below x = −17."""
    return torch.where(x < -1, torch.exp(x.clamp(max=0)) - 1, torch.expm1(x))
