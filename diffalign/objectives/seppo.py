"""SePPO (Zhang et al., arXiv 2410.05255): a chosen image against a sample of a policy snapshot, which may be better.

    L = −log σ( −(β/2) · (D^c − f · D^r) ),   D = E_policy − E_reference,   f without gradient

    anchor      f = −sign(D^c)       the policy became better at the chosen image: lower the other one's likelihood
                                     (DPO); worse: raise it as well; unchanged: fine-tune on the chosen image alone
    indicator   f = 1 where D^c < 0, else 0
    none        f = 1                SPIN-Diffusion's loss (Yuan et al., arXiv 2402.10210), and DPO's

Both sides share one t and one ε as in DPO. In the paper, the reference is a random snapshot of the policy, which also
generated the rejected images; `sources/selfplay.py` does this. The loss itself also works on fixed pairs.

No training code was released. The sign convention follows the description of the adaptive anchor in the paper's
algorithm, and nothing here could be compared with the authors' numbers. At the start D = 0, so f = 0: the loss is
exactly log 2, and its gradient is β/4 times that of fine-tuning on the chosen image.

By hand: E_policy = (.4, .3), E_reference = (.5, .5), β = 20 → D = (−.1, −.2), f = 1, logit = −10·(−.1 + .2) = −1,
loss = log(1 + e) = 1.3133. With E_policy^c = .6, D^c = .1, f = −1, logit = −10·(.1 − .2) = 1, loss = .3133.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.errors import DiffalignError
from diffalign.objectives.base import OnSharedNoise, less_margin, positive, reward_metrics
from diffalign.types import CHOSEN, REJECTED, Evidence, Score

FLIPS = ("anchor", "indicator", "none")


@dataclass(frozen=True)
class SePPO(OnSharedNoise):
    """DPO in which the rejected side changes its sign where the policy became worse at the chosen image."""

    beta: float = 2000.0  # errors are means over c·h·w; the paper's value for SD1.5, second-hand
    flip: Literal["anchor", "indicator", "none"] = "anchor"  # the paper's; an ablation there finds indicator as good

    name: ClassVar[str] = "seppo"
    paper: ClassVar[str] = "Zhang et al., SePPO: Semi-Policy Preference Optimization, arXiv 2410.05255"
    scale_field: ClassVar[str | None] = "beta"
    takes_margin: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        if self.flip not in FLIPS:
            raise DiffalignError(f"flip = {self.flip!r}; allowed: {', '.join(FLIPS)}")

    def score(self, evidence: Evidence) -> Score:
        """−log σ of the logit with the factor f on the rejected side; rewards are DPO's, without f."""
        reward = -(self.beta / 2) * evidence.margin
        f = self._factor(evidence.margin[CHOSEN].detach())
        logit = reward[CHOSEN] - f * reward[REJECTED]
        metrics = {**reward_metrics(reward[CHOSEN], reward[REJECTED]), "flip_rate": (f < 1).float()}
        return Score(loss=-logsigmoid(less_margin(logit, evidence)), logit=logit, metrics=metrics)

    def _factor(self, chosen: Tensor) -> Tensor:
        """f of each pair, from D^c."""
        if self.flip == "anchor":
            return -torch.sign(chosen)
        if self.flip == "indicator":
            return (chosen < 0).to(chosen.dtype)
        return torch.ones_like(chosen)
