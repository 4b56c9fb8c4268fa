"""The interface of the two model families, and their records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from diffalign.errors import ModelError as ModelError  # importable from here
from diffalign.models.loading.modules import TextModel
from diffalign.types import Conditioning


def check_resolution(unet: Any, factor: int, pixels: int, setting: str) -> None:
    """Raises ModelError for images whose latents a UNet cannot halve as often as it must.

    factor: pixels per latent position in each direction, a property of the VAE.
    """
    halvings = len(unet.config.block_out_channels) - 1
    least = factor * 2**halvings
    if pixels % factor or pixels < least:
        raise ModelError(
            f"{setting}: {pixels} pixels are too few or not a multiple of {factor}: this model's VAE "
            f"downsamples {factor}-fold, and its UNet halves {halvings} times; use a multiple of {factor}, "
            f"at least {least}"
        )


@dataclass(frozen=True)
class PromptEmbeds:
    """The text encoders' output for some prompts."""

    prompt_embeds: Tensor  # "n tokens dim"
    pooled: Tensor | None = None  # "n dim", SDXL only


@dataclass
class TextEncoders:
    """The tokenizers and text models of a base, in the order in which their embeddings are concatenated."""

    tokenizers: tuple[Any, ...]
    models: tuple[TextModel, ...]
    zero_empty_prompt: bool = False  # SDXL's force_zeros_for_empty_prompt: the null prompt is all zeros

    def tokenize(self, index: int, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask "n tokens" on the model's device, padded and cut to the full length."""
        tokenizer, model = self.tokenizers[index], self.models[index]
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        device = next(model.parameters()).device
        return tokens.input_ids.to(device), tokens.attention_mask.to(device)

    def overlong(self, prompts: Sequence[str]) -> dict[str, int]:
        """Prompts that a tokenizer would cut, each with the number of tokens lost (the larger of the two)."""
        lost: dict[str, int] = {}
        for tokenizer in self.tokenizers:
            # verbose=False: the tokenizer's own warning repeats once per process and names no prompt
            for prompt, ids in zip(prompts, tokenizer(list(prompts), verbose=False).input_ids, strict=True):
                if (extra := len(ids) - tokenizer.model_max_length) > 0:
                    lost[prompt] = max(extra, lost.get(prompt, 0))
        return lost


class Family(Protocol):
    """The differences between SD- and SDXL-like models."""

    @property
    def name(self) -> str:
        """ "sd" or "sdxl"."""

    @property
    def default_resolution(self) -> int:
        """Side of the square images that the base was trained on, in pixels."""

    def encode_prompts(self, text: TextEncoders, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings as the family's diffusers pipeline computes them; "" is the null prompt."""

    def time_ids(self, geometry: Tensor) -> Tensor | None:
        """SDXL's micro-conditioning, float32 "... 6"; None for a family that has none.

        `geometry` is int64 "... 6": original height and width, crop top and left, target height and width (pixels).
        """

    def unet_inputs(self, cond: Conditioning) -> dict[str, Any]:
        """Keyword arguments for the UNet from a flat conditioning ("n tokens dim")."""
