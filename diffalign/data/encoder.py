"""The part of a model's encoder that this package uses, as protocols: any object with these members will do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class PromptEmbeds(Protocol):
    """Text embeddings of n prompts."""

    @property
    def prompt_embeds(self) -> Tensor:
        """[n tokens dim]."""

    @property
    def pooled(self) -> Tensor | None:
        """[n dim]; None for families without a pooled embedding."""


class Encoder(Protocol):
    """VAE and text encoders of a base model, resident on some device."""

    @property
    def fingerprint(self) -> str:
        """Changes with the weights and configs of VAE and text encoders."""

    def moments(self, pixels: Tensor) -> Tensor:
        """Pixels [n 3 h w] in [-1, 1] -> mean and std of the scaled latent, [n 2c h w]."""

    def prompts(self, prompts: Sequence[str]) -> PromptEmbeds: ...

    def time_ids(self, geometry: Tensor) -> Tensor | None:
        """Micro-conditioning [... k] of int64 geometry [... 6]; None for families without it."""
