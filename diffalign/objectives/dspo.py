"""DSPO (Zhu et al., ICLR 2025): score matching on the chosen image, with the preference's score in the target.

    L = mean over c, h, w of ( e^c − g·(policy^c − reference^c) )²,   g = β·(1 − σ(h)),   h = −(β/2)(D^c − D^r)

e^c is the policy's residual at the chosen image, prediction less target. The rejected image acts through h alone. With
e^c − g·(policy − reference) = (1 − g)·e_policy + g·e_reference and d = |policy − reference|²,

    L = (1 − g)·E_policy^c + g·E_reference^c − g·(1 − g)·d^c

which needs no more than three numbers of the chosen image. As released (huaishengzhu/DSPO, train.py), β is also the
scale of h, and the gradient goes through g. β is .001 there, so that g is between 0 and .001: the loss is the
denoising loss of the chosen images and a thousandth of something else.

Not here: the release's SDXL form. By the micro-batch's mean of d^c, from .1 on it is (1 − σ(h))²·d^c, below it
(1 − σ(h))², where β is 5000. Which of the two a pair has there depends on the other pairs of its micro-batch, and
neither has the residual of the equation above. For SDXL this file computes the equation.

By hand: E_policy = (.4, .5), E_reference = (.5, .5), d^c = .02, β = 1 → h = .05, g = .4875,
L = .5125·.4 + .4875·.5 − .4875·.5125·.02 = .4438.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.errors import DiffalignError
from diffalign.objectives.base import OnSharedNoise, dpo_logit, positive
from diffalign.types import CHOSEN, Evidence, Score


@dataclass(frozen=True)
class DSPO(OnSharedNoise):
    """The denoising loss of the chosen image, its target moved by the score of the preference."""

    beta: float = 0.001  # scale of h and of the preference's score; the release's SD1.5 script

    name: ClassVar[str] = "dspo"
    paper: ClassVar[str] = (
        "Zhu et al., DSPO: Direct Score Preference Optimization for Diffusion Model Alignment (ICLR 2025), "
        "https://openreview.net/forum?id=xyfb9HHvMe"
    )
    takes_safeguard: ClassVar[bool] = True  # as in SDPO's release: λ on the rejected image's part of h
    needs_distance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)

    def score(self, evidence: Evidence) -> Score:
        """The squared residual at the chosen image, with the preference's score in its target."""
        h, metrics = dpo_logit(evidence, self.beta)
        if evidence.distance is None or evidence.reference is None:
            raise DiffalignError(
                "dspo: this evidence has no distance between policy and reference; measure it by `ask`"
            )
        g = self.beta * torch.sigmoid(-h)
        policy, reference = evidence.policy[CHOSEN], evidence.reference[CHOSEN]
        loss = (1 - g) * policy + g * reference - g * (1 - g) * evidence.distance[CHOSEN]
        return Score(loss=loss, logit=h, metrics=metrics)
