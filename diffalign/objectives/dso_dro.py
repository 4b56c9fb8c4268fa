"""DRO, the direct reward optimisation of DSO (Li et al., arXiv 2503.22677), with a floor under what it can gain.

    L = E_policy(x_c) − min( E_policy(x_r), E_reference(x_r) + m )

The denoising loss on chosen images minus that on rejected ones. There is no sigmoid to saturate, so the paper's
rejected term, E_policy(x_r) alone, can pay for ever: a policy that destroys its prediction there lowers the loss
without end. Here it pays up to m above the reference's error; beyond (D^r > m) it has no gradient any more, while the
chosen term keeps its own. The bound is relative to the reference because errors at a random t and ε differ far more
between draws than a policy changes them: one absolute bound would be reached at once at some timesteps and never at
others. It is a minimum and not a stopping rule, so that a pair comes back once its D^r is below m again.

Differs from the released code (RuiningLi/dso, forward_dro_loss): the bound, and with it the reference, which that code
does not need (a very large m is its loss); both sides share one ε, drawn there for each; a diffusion model in place of
a flow, with t uniform in place of logit-normal.

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

    margin: float = 0.001  # m, in units of the error; our choice: where DPO's reward of x_r is −2.5 at its β of 5000

    name: ClassVar[str] = "dso_dro"
    paper: ClassVar[str] = (
        "Li et al., DSO: Aligning 3D Generators with Simulation Feedback for Physical Soundness, arXiv 2503.22677"
    )

    def __post_init__(self) -> None:
        positive("margin", self.margin)

    def score(self, evidence: Evidence) -> Score:
        """The difference of the errors, the rejected one bounded; rewards are E_reference − E_policy."""
        logit, metrics = dpo_logit(evidence, beta=2.0)
        beyond = relu(evidence.margin[REJECTED] - self.margin)
        rejected = evidence.policy[REJECTED] - beyond  # min(E_policy, E_reference + m)
        metrics = {**metrics, "bound_rate": (beyond.detach() > 0).float()}
        return Score(loss=evidence.policy[CHOSEN] - rejected, logit=logit, metrics=metrics)
