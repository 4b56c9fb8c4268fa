"""Robust DPO (Chowdhury et al., arXiv 2403.00409): the unbiased correction for label noise.

    L = ( −(1−ε) log σ(h) + ε log σ(−h) ) / (1 − 2ε),   h Diffusion-DPO's logit, ε the share of labels that are wrong

Its mean over the label noise is the loss on clean labels. For pairs with a large wrong logit it has no lower bound. The
paper is about language models; here h is Diffusion-DPO's logit, and nothing else changes. Since
log σ(−h) = log σ(h) − h, it is computed as −log σ(h) − ε h / (1 − 2ε), which is exactly log 2 at h = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from diffalign.objectives.base import dpo_logit, less_margin
from diffalign.objectives.cdpo import ConservativeDPO
from diffalign.types import Evidence, Score


@dataclass(frozen=True)
class RobustDPO(ConservativeDPO):
    """Diffusion-DPO with the unbiased correction for label noise; the settings are those of conservative DPO."""

    name: ClassVar[str] = "robust_dpo"
    paper: ClassVar[str] = "Chowdhury et al., Provably Robust DPO, arXiv 2403.00409"

    def score(self, evidence: Evidence) -> Score:
        """The loss whose mean over label noise is the loss on clean labels."""
        h, metrics = dpo_logit(evidence, self.beta)
        e, x = self.label_smoothing, less_margin(h, evidence)
        return Score(loss=-logsigmoid(x) - e * x / (1 - 2 * e), logit=h, metrics=metrics)
