"""Supervised fine-tuning on the chosen images: the ordinary denoising loss, and the baseline to beat.

    L = E_policy(x_c)

On SD1.5 it raises PickScore. On SDXL it lowers it below the base's, from 21.87 to 21.48 on 500 Pick-a-Pic prompts, as
later papers report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.objectives.base import Compared, OnSharedNoise, SharedNoise
from diffalign.types import CHOSEN, Evidence, Score


@dataclass(frozen=True)
class SFT(OnSharedNoise):
    """The denoising loss on chosen images."""

    name: ClassVar[str] = "sft"
    paper: ClassVar[str] = "Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239, eq. 14"
    needs_reference: ClassVar[bool] = False
    compares: ClassVar[Compared] = "chosen images"

    @property
    def points(self) -> SharedNoise:
        """A (t, ε) for each chosen image; rejected images are not used."""
        return SharedNoise(sides=1, needs_reference=False)

    def score(self, evidence: Evidence) -> Score:
        """The error of the chosen side."""
        return Score(loss=evidence.policy[CHOSEN], logit=None)
