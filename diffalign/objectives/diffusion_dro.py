"""Diffusion-DRO (Wu et al., arXiv 2510.18353): expert images ranked above the policy's own images, by a margin.

    L = max( 0, m − (R_expert − R_policy) ),   R = E_reference − E_policy

A hinge replaces the sigmoid: a pair has full gradient until the expert image leads by m, and then none. The expert
images are the chosen ones. The others are samples of the current policy, which `sources/selfplay.py` generates with
`reference: latest`; the loss itself also works on fixed pairs. With equal weights it is exactly m. The paper's hinge
max(−m, −R_expert + R_policy) differs from it by the constant m.

Differs from the released code (basiclab/DiffusionDRO, train.py):
- there, x_t of the policy's images are states of its sampler, and the target is the prediction made there; here, the
  final images are noised again, with the same t and ε as the expert images, as in SePPO and SPIN;
- there, every step has new images, by a policy that is copied every 16 steps; `selfplay` generates a pool an iteration;
- there, E_reference is of the initial policy; with `selfplay` it is of the latest snapshot, so that each iteration
  starts at R = 0. In both cases the reference has no gradient.

By hand: E_policy = (.4, .5), E_reference = (.5, .5), m = .3 → R = (.1, 0), L = .3 − .1 = .2, slopes (1, −1).
With m = .05 the expert image leads by more than m: L = 0, slopes (0, 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import relu

from diffalign.objectives.base import OnSharedNoise, dpo_logit, positive
from diffalign.types import Evidence, Score


@dataclass(frozen=True)
class DiffusionDRO(OnSharedNoise):
    """Hinge on the difference of denoising rewards between expert images and the policy's own."""

    margin: float = 0.001  # m, in units of the error; the released code's default

    name: ClassVar[str] = "diffusion_dro"
    paper: ClassVar[str] = (
        "Wu et al., Ranking-based Preference Optimization for Diffusion Models from Implicit User Feedback "
        "(Diffusion-DRO), arXiv 2510.18353"
    )
    takes_signs: ClassVar[bool] = True
    takes_safeguard: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("margin", self.margin)

    def score(self, evidence: Evidence) -> Score:
        """The hinge; the logit is R_expert − R_policy."""
        ahead, metrics = dpo_logit(evidence, beta=2.0)
        missing = self.margin - ahead
        metrics = {**metrics, "hinge_rate": (missing.detach() > 0).float()}
        return Score(loss=relu(missing), logit=ahead, metrics=metrics)
