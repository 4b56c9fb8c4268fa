"""DRO, the direct reward optimisation of DSO (Li et al., arXiv 2503.22677), with a lower bound on its loss.

    L = E_policy(x_c) − min( E_policy(x_r), E_reference(x_r) + m )

The denoising loss on chosen images minus that on rejected ones. No sigmoid saturates it. The paper's rejected term,
E_policy(x_r) alone, has no bound: a policy can lower the loss forever by destroying its prediction there. Here the
term has no gradient where E_policy(x_r) is more than m above the reference's error (D^r > m); the chosen term still
has its gradient. The bound is relative to the reference because errors differ far more between draws of t and ε than a
policy changes them: an absolute bound would be exceeded at once at some timesteps and never at others. The gradient
returns when D^r falls below m again.

Differs from the released code (RuiningLi/dso, forward_dro_loss):
- the bound, and with it the reference, which that code does not need; a very large m gives its loss;
- both sides share one ε, which is drawn for each side there;
- a diffusion model with uniform t, there a flow with logit-normal t.

By hand: E_policy = (.4, .6), E_reference = (.5, .5), m = .2 → L = .4 − min(.6, .7) = −.2, slopes (1, −1).
With m = .05: L = .4 − min(.6, .55) = −.15, slopes (1, 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import relu

from diffalign.objectives.base import OnSharedNoise, dpo_logit, positive
from diffalign.types import CHOSEN, REJECTED, Evidence, Score


@dataclass(frozen=True)
class DSODRO(OnSharedNoise):
    """Denoising loss of chosen images minus that of rejected ones, bounded against the reference."""

    margin: float = 0.001  # m, in units of the error; our choice: there DPO's reward of x_r is −2.5, with β = 5000

    name: ClassVar[str] = "dso_dro"
    paper: ClassVar[str] = (
        "Li et al., DSO: Aligning 3D Generators with Simulation Feedback for Physical Soundness, arXiv 2503.22677"
    )

    def __post_init__(self) -> None:
        positive("margin", self.margin)

    def score(self, evidence: Evidence) -> Score:
        """The difference of the errors with the rejected one bounded; rewards are E_reference − E_policy."""
        logit, metrics = dpo_logit(evidence, beta=2.0)
        beyond = relu(evidence.margin[REJECTED] - self.margin)
        rejected = evidence.policy[REJECTED] - beyond  # min(E_policy, E_reference + m)
        metrics = {**metrics, "bound_rate": (beyond.detach() > 0).float()}
        return Score(loss=evidence.policy[CHOSEN] - rejected, logit=logit, metrics=metrics)
