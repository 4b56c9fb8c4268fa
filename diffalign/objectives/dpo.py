"""Diffusion-DPO (Wallace et al., arXiv 2311.12908, eq. 14).

    L = −log σ( −(β/2) · (D^c − D^r) ),   D = E_policy − E_reference at the same x_t, t and ε

Both sides of a pair share one t ~ U{0 … T−1} and one ε. A policy equal to its reference has a loss of exactly log 2.
The loss measures how far the policy has moved, not how good it is; evaluate a win rate for that.

Differs from the released code (SalesforceAIResearch/DiffusionDPO): both sides of a pair are cropped and flipped alike,
and policy and reference use the same dtypes, so that the margin is exactly 0 at the start.

By hand: E_policy = (.4, .5), E_reference = (.5, .5), β = 20 → D = (−.1, 0), logit = −10·(−.1 − 0) = 1,
loss = log(1 + e^−1) = .3133.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from diffalign.objectives.base import OnSharedNoise, SharedNoise, dpo_logit, less_margin, positive, timesteps_valid
from diffalign.types import Evidence, Score


@dataclass(frozen=True)
class DiffusionDPO(OnSharedNoise):
    """Direct preference optimisation of a denoiser against a frozen reference."""

    beta: float = 5000.0  # errors are means over c·h·w; the released SDXL and SD1.5 launchers use 5000
    timesteps: tuple[int, ...] | None = None  # null: all; SDXL-Turbo in the release: 249, 499, 749, 999

    name: ClassVar[str] = "dpo"
    paper: ClassVar[str] = "Wallace et al., Diffusion Model Alignment Using DPO, arXiv 2311.12908"
    scale_field: ClassVar[str | None] = "beta"
    takes_margin: ClassVar[bool] = True
    takes_signs: ClassVar[bool] = True
    takes_safeguard: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        timesteps_valid(self.timesteps)

    @property
    def points(self) -> SharedNoise:
        """One shared (t, ε) for each pair, t from `timesteps`."""
        return SharedNoise(self.timesteps)

    def score(self, evidence: Evidence) -> Score:
        """−log σ of the logit."""
        logit, metrics = dpo_logit(evidence, self.beta)
        return Score(loss=-logsigmoid(less_margin(logit, evidence)), logit=logit, metrics=metrics)
