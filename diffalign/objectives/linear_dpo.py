"""Linear-DPO (Li et al., arXiv 2605.21123): DPO's weight of a pair, a sigmoid, replaced by a clipped straight line.

    L = w · (E^c − E^r),   w = clip( ½ + β/5 · (D^c − D^r), η, 1 − η ),   no gradient through w

E is the policy's error and D = E_policy − E_reference. DPO's gradient is (β/2)·σ(−h)·∇(E^c − E^r) with
h = −(β/2)(D^c − D^r); here w = ½ − .4·h takes the place of σ(−h), and the factor β/2 is left out. At h = 0 the slope of
σ(−h) is −¼, so the line is steeper. A pair reaches the bounds at |h| = 1.25 (η = 0). At η = 0, a pair beyond h = 1.25
has no gradient; at η > 0 each pair has some, however large its margin is. The loss is 0 on average at the start, and
its value says little.

As the released code (WhynotChen0105/Linear-DPO, train/train_sd_dpo.py), whose constants .2 and .5 these are. The
paper's reference is an exponential moving average of the policy; so is that of the release's SD1.5 script, while its
SDXL script has a fixed one. Here `training.ref_model_sync_steps: 1` with `ref_model_mixup_alpha: 0.005` is that
average.

By hand: E_policy = (.4, .6), E_reference = (.5, .5), β = 2 → D^c − D^r = −.2, h = .2, w = .5 − .08 = .42,
loss = .42·(.4 − .6) = −.084.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.errors import DiffalignError
from diffalign.objectives.base import OnSharedNoise, dpo_logit, positive
from diffalign.types import CHOSEN, REJECTED, Evidence, Score


@dataclass(frozen=True)
class LinearDPO(OnSharedNoise):
    """Diffusion-DPO with a linear weight of each pair's gradient."""

    beta: float = 500.0  # the release's SDXL script; its SD1.5 script: 100
    eta: float = 0.001  # η, the smallest weight of a pair; the release's SD1.5 script; its SDXL script: 0

    name: ClassVar[str] = "linear_dpo"
    paper: ClassVar[str] = (
        "Li et al., Linear-DPO: Linear Direct Preference Optimization for Diffusion and Flow-Matching Generative "
        "Models, arXiv 2605.21123"
    )
    scale_field: ClassVar[str | None] = "beta"
    takes_signs: ClassVar[bool] = True
    takes_safeguard: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        if not 0 <= self.eta < 0.5:
            raise DiffalignError(f"eta = {self.eta}: must be in [0, 0.5); weights are clipped to [eta, 1 - eta]")

    def score(self, evidence: Evidence) -> Score:
        """The difference of the sides' errors, times a weight that falls as the margin grows."""
        h, metrics = dpo_logit(evidence, self.beta)
        weight = (0.5 - 0.4 * h.detach()).clamp(self.eta, 1 - self.eta)
        return Score(loss=weight * (evidence.policy[CHOSEN] - evidence.policy[REJECTED]), logit=h, metrics=metrics)
