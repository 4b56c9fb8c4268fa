"""IPO (Azar et al., arXiv 2310.12036, eq. 17) on Diffusion-DPO's difference of errors.

    L = ( −(D^c − D^r) − 1/(2τ) )²

A regression to a fixed margin instead of a sigmoid: no saturation, no drift to infinite margins. The loss is of the
order 1/(4τ²) at the start, so with τ in the thousands its gradients are small; lower Adam's epsilon accordingly.

By hand: D = (−.1, 0), τ = 10 → (.1 − .05)² = .0025.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffalign.engine.measure import Models
from diffalign.objectives.base import dpo_logit, positive, shared_noise, shared_noise_facts
from diffalign.types import Evidence, PairBatch, Probe, Score


@dataclass(frozen=True)
class IPO:
    """Identity preference optimisation of a denoiser."""

    tau: float = 5000.0  # the margin of errors aimed at is 1/(2τ)

    name: ClassVar[str] = "ipo"
    paper: ClassVar[str] = (
        "Azar et al., A General Paradigm to Understand Learning from Human Preferences (IPO), arXiv 2310.12036"
    )
    needs_reference: ClassVar[bool] = True
    needs_uncond: ClassVar[bool] = False
    takes_signs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("tau", self.tau)

    @property
    def drawn(self) -> dict[str, Any]:
        """See `objectives.base.Drawn`."""
        return shared_noise_facts()

    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """As Diffusion-DPO."""
        return shared_noise(batch, models.schedule)

    def score(self, evidence: Evidence) -> Score:
        """Squared distance of the margin from 1/(2τ)."""
        h, metrics = dpo_logit(evidence, beta=2.0)  # h = −(D^c − D^r)
        return Score(loss=(h - 1 / (2 * self.tau)) ** 2, logit=h, metrics=metrics)
