"""IPO (Azar et al., arXiv 2310.12036, eq. 17) on Diffusion-DPO's difference of errors.

    L = ( −(D^c − D^r) − 1/(2τ) )²

A regression to a fixed margin instead of a sigmoid: it does not saturate, and margins do not grow forever. The loss is
about 1/(4τ²) at the start. With τ in the thousands its gradients are small, so lower Adam's epsilon.

By hand: D = (−.1, 0), τ = 10 → (.1 − .05)² = .0025.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.objectives.base import OnSharedNoise, dpo_logit, positive
from diffalign.types import Evidence, Score


@dataclass(frozen=True)
class IPO(OnSharedNoise):
    """Identity preference optimisation on Diffusion-DPO's difference of errors."""

    tau: float = 5000.0  # the target margin of errors is 1/(2τ)

    name: ClassVar[str] = "ipo"
    paper: ClassVar[str] = (
        "Azar et al., A General Paradigm to Understand Learning from Human Preferences (IPO), arXiv 2310.12036"
    )
    scale_field: ClassVar[str | None] = "tau"
    scale_in_logit: ClassVar[bool] = False
    takes_signs: ClassVar[bool] = True
    takes_safeguard: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("tau", self.tau)

    def score(self, evidence: Evidence) -> Score:
        """Squared distance of the margin from 1/(2τ)."""
        h, metrics = dpo_logit(evidence, beta=2.0)  # h = −(D^c − D^r)
        return Score(loss=(h - 1 / (2 * self.tau)) ** 2, logit=h, metrics=metrics)
