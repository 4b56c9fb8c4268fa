"""What this room needs of the models room: an object with these four members, checked by shape alone."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class PromptEmbeds(Protocol):
    """Text embeddings of n prompts."""

    prompt_embeds: Tensor  # [n tokens dim]
    pooled: Tensor | None  # [n dim], None for families without a pooled embedding


class Encoder(Protocol):
    """VAE and text encoders of a base model, resident on some device."""

    fingerprint: str  # changes with the weights and configs of VAE and text encoders

    def moments(self, pixels: Tensor) -> Tensor:
        """Pixels [n 3 h w] in [-1, 1] -> mean and std of the scaled latent, [n 2c h w]."""

    def prompts(self, prompts: list[str]) -> PromptEmbeds: ...

    def time_ids(self, geometry: Tensor) -> Tensor | None:
        """Micro-conditioning [... k] of int64 geometry [... 6]; None for families without it."""
