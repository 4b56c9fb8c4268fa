"""The interface of the two model families, and their records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from torch import Tensor, nn

from diffalign.errors import ModelError as ModelError  # importable from here
from diffalign.models.loading.modules import TextModel
from diffalign.models.text.chunks import chunk_rows, joined, tokens_of
from diffalign.models.text.spec import TextSpec
from diffalign.models.text.weights import weighted
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
    """The tokenizers and text models of a base, in the order in which their embeddings are concatenated.

    Raises ModelError for a spec that these text models cannot have.
    """

    tokenizers: tuple[Any, ...]
    models: tuple[TextModel, ...]
    zero_empty_prompt: bool = False  # SDXL's force_zeros_for_empty_prompt: the null prompt is all zeros
    spec: TextSpec = field(default_factory=TextSpec)

    def __post_init__(self) -> None:
        length, skip, per_chunk = self.spec.max_token_length, self.spec.clip_skip, self.tokens_per_chunk
        if length is not None and length % per_chunk:
            raise ModelError(
                f"max_token_length: {length} is not a multiple of {per_chunk}, the tokens of one chunk of this base's "
                f"text encoders; use {per_chunk}, {2 * per_chunk}, {3 * per_chunk}, …"
            )
        # what SDXL's pipeline leaves out anyway is on top of what is skipped
        spare = min(model.config.num_hidden_layers for model in self.models) - (2 if len(self.models) > 1 else 1)
        if skip > spare:
            raise ModelError(f"clip_skip: {skip} is more than this base's text encoders allow; at most {spare}")

    @property
    def tokens_per_chunk(self) -> int:
        """Tokens of one chunk without BOS and EOS: 75 for CLIP."""
        return int(min(tokenizer.model_max_length for tokenizer in self.tokenizers)) - 2

    @property
    def chunks(self) -> int:
        """Chunks that every prompt has."""
        length = self.spec.max_token_length
        return 1 if length is None else length // self.tokens_per_chunk

    def tokenize(self, index: int, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask "n·chunks tokens" on the model's device, padded and cut to the full length."""
        tokenizer, model = self.tokenizers[index], self.models[index]
        device = next(model.parameters()).device
        if self.chunks > 1:
            ids, mask = chunk_rows(tokenizer, prompts, self.chunks)
            return ids.to(device), mask.to(device)
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(device), tokens.attention_mask.to(device)

    def joined(self, hidden: Tensor) -> Tensor:
        """Embeddings "n tokens dim" from those of all chunks."""
        return joined(hidden, self.chunks, self.spec.chunk_layout)

    def overlong(self, prompts: Sequence[str]) -> dict[str, int]:
        """Prompts that would be cut, each with the number of tokens lost (the larger of the two tokenizers')."""
        lost: dict[str, int] = {}
        for tokenizer in self.tokenizers:
            for prompt, ids in zip(prompts, tokens_of(tokenizer, prompts), strict=True):
                if (extra := len(ids) - self.limit) > 0:
                    lost[prompt] = max(extra, lost.get(prompt, 0))
        return lost

    def weighted(self, prompts: Sequence[str]) -> dict[str, list[str]]:
        """Prompts with weights such as (word:1.2), which are encoded as text; raises ModelError to refuse them."""
        return weighted(prompts, self.spec.prompt_weights)

    @property
    def limit(self) -> int:
        """Tokens of a prompt that are encoded, without BOS and EOS."""
        return self.chunks * self.tokens_per_chunk


def final_norm(model: TextModel) -> nn.Module:
    """The layer norm behind the last layer of a CLIP text model."""
    inner: Any = getattr(model, "text_model", model)  # CLIPTextModel is its own inner model in transformers 5
    return cast("nn.Module", inner.final_layer_norm)


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
