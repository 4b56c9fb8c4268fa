"""f-DPO (Wang et al., arXiv 2309.16240): DPO with another divergence from the reference than the reverse KL.

    L = −log σ( p · (g(u^c) − g(u^r)) ),   u = −(β/2)·D / p   the log-ratio of policy to reference

    reverse_kl   g(u) = u                        Diffusion-DPO, to the last bit
    forward_kl   g(u) = 1 − e^{−u}
    js           g(u) = log( 2e^u / (1 + e^u) )
    alpha        g(u) = (1 − e^{−αu}) / α        α → 0: reverse_kl; α → 1: forward_kl

g is f' of the paper's table at the ratio e^u, plus a constant that makes g(0) = 0 and that the difference removes. p is
the paper's β, the weight of the divergence. β here is Diffusion-DPO's, which is that weight times the scale of the
log-ratio; so at u = 0 the slopes are DPO's (js: half of them).

All links except the reverse KL are bounded above, by 1, log 2 and 1/α: the reward of a chosen image cannot grow for
ever. Downwards, forward_kl and alpha grow exponentially. Above `max_exponent`, e^x continues as its tangent there. A
clamp would remove the gradient of exactly those images that the policy has made most unlikely. In float32, too, links
and slopes follow the formulas.

The paper is about language models. Using −(β/2)D/p as the log-ratio is our reading, as in Diffusion-DPO.

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

MAX_EXPONENT = 40.0  # e^40 · 1e10 is far below float32's largest number, e^88.7
LINKS = ("reverse_kl", "forward_kl", "js", "alpha")


@dataclass(frozen=True)
class FDPO(OnSharedNoise):
    """Diffusion-DPO with the link of an f-divergence."""

    beta: float = 5000.0  # as DiffusionDPO
    link: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "js"  # the divergence; our choice, between both KLs
    alpha: float | None = None  # α in (0, 1), for link alpha alone
    penalty: float = 1.0  # p, the paper's β; a smaller p means larger log-ratios, which the links bend more; our choice
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
                f"max_exponent = {self.max_exponent}: set at most {MAX_EXPONENT:g}; above, float32 losses overflow"
            )
        if self.link not in LINKS:
            raise DiffalignError(f"link = {self.link!r}; allowed: {', '.join(LINKS)}")
        if self.link != "alpha" and self.alpha is not None:
            raise DiffalignError(
                f"alpha = {self.alpha}: only link alpha has this setting, and link is {self.link}; remove it"
            )
        if self.link == "alpha" and (self.alpha is None or not 0 < self.alpha < 1):
            raise DiffalignError(
                f"alpha = {self.alpha}: link alpha needs a value in (0, 1); 0 is link reverse_kl, 1 is link forward_kl"
            )

    def score(self, evidence: Evidence) -> Score:
        """−log σ of the difference of the implicit rewards p·g."""
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
        alpha = 1.0 if self.alpha is None else self.alpha  # forward_kl is alpha = 1
        return -p * tangent_expm1(-alpha * h / p, self.max_exponent) / alpha


def js_link(u: Tensor) -> Tensor:
    """log(2e^u / (1 + e^u)), precise near u = 0, where it is u/2, and without overflow far from 0."""
    above = -torch.log1p(expm1(-u.clamp(min=0)) / 2)
    below = u - torch.log1p(expm1(u.clamp(max=0)) / 2)
    return torch.where(u < 0, below, above)


def tangent_expm1(x: Tensor, limit: float) -> Tensor:
    """e^x − 1 up to x = limit, and beyond it the tangent at limit: finite, with a slope that is never 0.

    Only one of the two terms has a slope at each x. Two terms of size e^limit that cancel would lose it in float32.
    """
    return expm1(x.clamp(max=limit)) + math.exp(limit) * relu(x - limit)


def expm1(x: Tensor) -> Tensor:
    """e^x − 1 with a precise slope. The slope of torch.expm1 is its result + 1, which is 0 in float32 below x = −17."""
    return torch.where(x < -1, torch.exp(x.clamp(max=0)) - 1, torch.expm1(x))
