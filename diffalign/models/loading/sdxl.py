"""SDXL: embeddings of two text encoders, a pooled embedding, and true sizes and crops as micro-conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.models.loading.family import PromptEmbeds, TextEncoders
from diffalign.types import Conditioning


@dataclass(frozen=True)
class StableDiffusionXL:
    """SDXL base and models with its structure; not the refiner, which has one encoder and an aesthetic score."""

    default_resolution: int = 1024
    name: str = "sdxl"

    def encode_prompts(self, text: TextEncoders, prompts: Sequence[str]) -> PromptEmbeds:
        """hidden_states[-2] of both encoders, concatenated along dim; pooled is the second's projected text embedding.

        Clip skip takes an earlier hidden state, and leaves the pooled embedding as it is. Of several chunks the first
        gives the pooled embedding.

        With the base's `force_zeros_for_empty_prompt` both are zero for "": the pipeline guides with that null prompt,
        so a dropped prompt must become the same.
        """
        hidden = []
        pooled = None
        for index, model in enumerate(text.models):
            ids, _ = text.tokenize(index, prompts)
            out = model(ids, output_hidden_states=True)
            hidden.append(text.joined(out.hidden_states[-2 - text.spec.clip_skip]))
            pooled = out[0][:: text.chunks]
        assert pooled is not None, "load_base gives SDXL two text encoders"
        prompt_embeds = torch.cat(hidden, dim=-1)
        if text.zero_empty_prompt:
            empty = torch.tensor([prompt == "" for prompt in prompts], device=prompt_embeds.device)
            prompt_embeds = prompt_embeds.masked_fill(empty[:, None, None], 0)
            pooled = pooled.masked_fill(empty[:, None], 0)
        return PromptEmbeds(prompt_embeds, pooled)

    def time_ids(self, geometry: Tensor) -> Tensor:
        """The six numbers as float32: half precision would round 1023 to 1024."""
        if geometry.shape[-1] != 6:
            raise DiffalignError(
                f"geometry has shape {tuple(geometry.shape)}; its last axis must contain six pixel "
                "counts: original h w, crop top left, target h w"
            )
        return geometry.to(torch.float32)

    def unet_inputs(self, cond: Conditioning) -> dict[str, Any]:
        """Cross-attention states, pooled text and time ids."""
        if cond.pooled is None or cond.time_ids is None:
            missing = [name for name in ("pooled", "time_ids") if getattr(cond, name) is None]
            raise DiffalignError(
                f"an SDXL network needs Conditioning.{' and .'.join(missing)}; this batch was encoded "
                "without it (by an SD encoder?): encode it again with this base"
            )
        return {
            "encoder_hidden_states": cond.prompt_embeds,
            "added_cond_kwargs": {"text_embeds": cond.pooled, "time_ids": cond.time_ids},
        }
