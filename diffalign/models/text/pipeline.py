"""Text embeddings for an open diffusers pipeline: its own, or with long prompts and clip skip as in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.models.loading.family import PromptEmbeds, TextEncoders
from diffalign.models.loading.sd import StableDiffusion
from diffalign.models.loading.sdxl import StableDiffusionXL
from diffalign.models.text.notices import PromptNotices
from diffalign.models.text.spec import TextSpec

_EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_NOTICES = PromptNotices()  # of this process: images are sampled in many calls


def pipeline_embeddings(
    pipe: Any, prompts: Sequence[str], spec: TextSpec, negative_prompt: str, *, guided: bool
) -> dict[str, Tensor]:
    """Arguments of the pipeline in place of prompts, each prompt encoded once, rows in the order of `prompts`.

    With the default spec they are the pipeline's own. Otherwise they are those of training, for the negative prompt
    as well (the argument `clip_skip` of diffusers' pipelines is for the prompt alone). Raises ModelError for a spec
    that the pipeline's text encoders cannot have.
    """
    texts = list(dict.fromkeys(prompts))
    encoders = None if getattr(pipe, "tokenizer", None) is None else _encoders(pipe, spec)
    if encoders is not None:
        _NOTICES.check(encoders, [*texts, negative_prompt] if guided else texts)
    if encoders is None or not spec.recorded:
        embeds = pipe.encode_prompt(
            texts,
            device=pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            # None, not "": SDXL replaces a negative prompt that was not given by zeros, as it was trained
            negative_prompt=[negative_prompt] * len(texts) if negative_prompt else None,
        )
    else:
        embeds = _ours(encoders, texts, negative_prompt, guided)
    place = {text: i for i, text in enumerate(texts)}
    rows = torch.tensor([place[prompt] for prompt in prompts], device=pipe._execution_device)
    return {name: value[rows] for name, value in zip(_EMBEDS, embeds) if value is not None}


def _encoders(pipe: Any, spec: TextSpec) -> TextEncoders:
    suffixes = ("",) if getattr(pipe, "text_encoder_2", None) is None else ("", "_2")
    return TextEncoders(
        tokenizers=tuple(getattr(pipe, f"tokenizer{suffix}") for suffix in suffixes),
        models=tuple(getattr(pipe, f"text_encoder{suffix}") for suffix in suffixes),
        zero_empty_prompt=len(suffixes) == 2 and bool(pipe.config.get("force_zeros_for_empty_prompt", False)),
        spec=spec,
    )


def _ours(
    encoders: TextEncoders, texts: Sequence[str], negative_prompt: str, guided: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """In the order of `_EMBEDS`."""
    family = StableDiffusion() if len(encoders.models) == 1 else StableDiffusionXL()
    positive: PromptEmbeds = family.encode_prompts(encoders, texts)
    if not guided:
        return positive.prompt_embeds, None, positive.pooled, None
    negative = family.encode_prompts(encoders, [negative_prompt])
    pooled = None if negative.pooled is None else negative.pooled.expand(len(texts), -1)
    return positive.prompt_embeds, negative.prompt_embeds.expand(len(texts), -1, -1), positive.pooled, pooled
