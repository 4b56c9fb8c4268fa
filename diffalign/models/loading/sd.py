"""SD1.5 and SD2: one CLIP text encoder, no micro-conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffalign.models.loading.family import PromptEmbeds, TextEncoders, final_norm
from diffalign.types import Conditioning


@dataclass(frozen=True)
class StableDiffusion:
    """SD2's penultimate text layer needs no code: its text encoder's config simply has one layer less."""

    default_resolution: int = 512
    name: str = "sd"

    def encode_prompts(self, text: TextEncoders, prompts: Sequence[str]) -> PromptEmbeds:
        """The text model's last hidden state, or with clip skip an earlier one behind the same final layer norm."""
        ids, mask = text.tokenize(0, prompts)
        model, skip = text.models[0], text.spec.clip_skip
        use_mask = getattr(model.config, "use_attention_mask", False)
        out = model(ids, attention_mask=mask if use_mask else None, output_hidden_states=skip > 0)
        return PromptEmbeds(text.joined(final_norm(model)(out.hidden_states[-1 - skip]) if skip else out[0]))

    def time_ids(self, geometry: Tensor) -> None:
        """None: these models take no sizes or crops as input."""
        return None

    def unet_inputs(self, cond: Conditioning) -> dict[str, Any]:
        """Cross-attention states only."""
        return {"encoder_hidden_states": cond.prompt_embeds}
