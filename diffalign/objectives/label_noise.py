"""DPO for labels that are wrong with a known rate ε: conservative (biased) and robust (unbiased).

    conservative   L = −(1−ε) log σ(h) − ε log σ(−h)   Mitchell, "A note on DPO with noisy preferences"
    robust         L = ( −(1−ε) log σ(h) + ε log σ(−h) ) / (1 − 2ε)   Chowdhury et al., arXiv 2403.00409

with h Diffusion-DPO's logit. Both were stated for language models; the logit is the only thing that changes.
The conservative loss has its minimum at the finite logit log((1−ε)/ε); the robust one is, on average over the
label noise, the loss on clean labels, and is unbounded below for pairs that the policy gets very wrong.
Both are computed with log σ(−h) = log σ(h) − h, which makes them exactly log 2 at h = 0:

    conservative   L = −log σ(h) + ε h
    robust         L = −log σ(h) − ε h / (1 − 2ε)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from diffalign.engine.measure import Models
from diffalign.objectives.base import dpo_logit, positive, shared_noise
from diffalign.records import Evidence, PairBatch, Probe, Score


@dataclass(frozen=True)
class ConservativeDPO:
    """Diffusion-DPO with smoothed labels."""

    beta: float = 5000.0  # as DiffusionDPO
    label_smoothing: float = 0.1  # ε, the share of labels believed to be wrong

    name: ClassVar[str] = "cdpo"
    paper: ClassVar[str] = "Mitchell, A note on DPO with noisy preferences & relationship to IPO, 2023"
    needs_reference: ClassVar[bool] = True
    needs_uncond: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        _is_rate(self.label_smoothing)

    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """As Diffusion-DPO."""
        return shared_noise(batch, models.schedule)

    def score(self, evidence: Evidence) -> Score:
        """Cross-entropy against labels (1−ε, ε)."""
        h, metrics = dpo_logit(evidence, self.beta)
        e = self.label_smoothing
        return Score(loss=-logsigmoid(h) + e * h, logit=h, metrics=metrics)


@dataclass(frozen=True)
class RobustDPO:
    """Diffusion-DPO with the unbiased correction for label noise."""

    beta: float = 5000.0  # as DiffusionDPO
    label_smoothing: float = 0.1  # ε, the share of labels believed to be wrong

    name: ClassVar[str] = "robust_dpo"
    paper: ClassVar[str] = "Chowdhury et al., Provably Robust DPO, arXiv 2403.00409"
    needs_reference: ClassVar[bool] = True
    needs_uncond: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        _is_rate(self.label_smoothing)

    def probe(self, batch: PairBatch, models: Models) -> Probe:
        """As Diffusion-DPO."""
        return shared_noise(batch, models.schedule)

    def score(self, evidence: Evidence) -> Score:
        """The loss whose mean over flipped labels is the clean one."""
        h, metrics = dpo_logit(evidence, self.beta)
        e = self.label_smoothing
        return Score(loss=-logsigmoid(h) - e * h / (1 - 2 * e), logit=h, metrics=metrics)


def _is_rate(e: float) -> None:
    if not 0 <= e < 0.5:
        raise ValueError(f"label_smoothing = {e}: must be in [0, 0.5), the share of labels believed to be wrong")
