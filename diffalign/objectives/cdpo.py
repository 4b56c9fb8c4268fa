"""Conservative DPO (Mitchell, "A note on DPO with noisy preferences & relationship to IPO", 2023).

    L = −(1−ε) log σ(h) − ε log σ(−h),   h Diffusion-DPO's logit, ε the share of labels assumed to be wrong

Cross-entropy with smoothed labels; its minimum is at the finite logit log((1−ε)/ε). The paper is about language models;
here h is Diffusion-DPO's logit, and nothing else changes. Since log σ(−h) = log σ(h) − h, it is computed as
−log σ(h) + ε h, which is exactly log 2 at h = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from diffalign.objectives.base import OnSharedNoise, dpo_logit, less_margin, noise_rate, positive
from diffalign.types import Evidence, Score


@dataclass(frozen=True)
class ConservativeDPO(OnSharedNoise):
    """Diffusion-DPO with smoothed labels."""

    beta: float = 5000.0  # as DiffusionDPO
    label_smoothing: float = 0.1  # ε, the share of labels assumed to be wrong

    name: ClassVar[str] = "cdpo"
    paper: ClassVar[str] = (
        "Mitchell, A note on DPO with noisy preferences & relationship to IPO, 2023, https://ericmitchell.ai/cdpo.pdf"
    )
    scale_field: ClassVar[str | None] = "beta"
    takes_margin: ClassVar[bool] = True
    takes_signs: ClassVar[bool] = True
    takes_safeguard: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        noise_rate(self.label_smoothing)

    def score(self, evidence: Evidence) -> Score:
        """Cross-entropy with the labels (1−ε, ε)."""
        h, metrics = dpo_logit(evidence, self.beta)
        e, x = self.label_smoothing, less_margin(h, evidence)
        return Score(loss=-logsigmoid(x) + e * x, logit=h, metrics=metrics)
