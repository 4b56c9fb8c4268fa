"""Diffusion-DRO (Wu et al., arXiv 2510.18353): experts' pictures ranked above the policy's own, by a margin.

    L = max( 0, m − (R_expert − R_policy) ),   R = E_reference − E_policy

A ranking in place of a sigmoid: a pair counts in full until the expert's picture is ahead by m, and then not at all.
The experts are the chosen images; the others are samples of the policy as it is now, which `sources/selfplay.py` makes
with `reference: latest`. On fixed pairs the loss stands by itself. With equal weights it is exactly m. It is
max(−m, −R_expert + R_policy) + m: that hinge, with its flat end at 0.

Differs from the released code (basiclab/DiffusionDRO, train.py): there the policy's x_t are states on its sampler's
path and the target is the prediction that it made there; here its final pictures get noise afresh, the same t and ε as
the expert's, as in SePPO and SPIN. There a new picture is made for every step by a policy that is copied every 16;
with `selfplay`, each iteration makes a pool. There E_reference is the first policy's; with `selfplay` it is the
latest's, so the margin is to be won anew in every iteration. Where the hinge is active the reference has no
gradient in either case.

By hand: E_policy = (.4, .5), E_reference = (.5, .5), m = .3 → R = (.1, 0), L = .3 − .1 = .2, slopes (1, −1).
With m = .05 the expert is ahead by more: L = 0, slopes (0, 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import relu

from diffalign.objectives.base import OnSharedNoise, dpo_logit, positive
from diffalign.types import Evidence, Score


@dataclass(frozen=True)
class DiffusionDRO(OnSharedNoise):
    """Hinge on the difference of denoising rewards between experts' pictures and the policy's own."""

    margin: float = 0.001  # m, in units of the error; the released code's default

    name: ClassVar[str] = "diffusion_dro"
    paper: ClassVar[str] = (
        "Wu et al., Ranking-based Preference Optimization for Diffusion Models from Implicit User Feedback "
        "(Diffusion-DRO), arXiv 2510.18353"
    )
    takes_signs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("margin", self.margin)

    def score(self, evidence: Evidence) -> Score:
        """The hinge; the logit is R_expert − R_policy."""
        ahead, metrics = dpo_logit(evidence, beta=2.0)
        missing = self.margin - ahead
        metrics = {**metrics, "hinge_rate": (missing.detach() > 0).float()}
        return Score(loss=relu(missing), logit=ahead, metrics=metrics)
