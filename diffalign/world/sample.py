"""Samples of a world pipeline, as every figure of the world is made: 20 DDIM steps at guidance 5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

STEPS = 20
GUIDANCE = 5.0
BATCH = 96


def sample_pixels(
    pipe: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """Images uint8 "n h w 3", one per prompt and seed; the start noise depends on the seed alone."""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(prompts), BATCH):
        made = pipe(
            prompt=list(prompts[start : start + BATCH]),
            generator=[torch.Generator().manual_seed(s) for s in seeds[start : start + BATCH]],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
        ).images
        parts.append((made.permute(0, 2, 3, 1) * 255).round().to(torch.uint8))
    return torch.cat(parts)


def with_seeds(prompts: Sequence[str], seeds: int) -> tuple[list[str], list[int]]:
    """Each prompt with `seeds` seeds of its own: prompts and seeds of equal length, grouped by prompt."""
    texts = [p for p in prompts for _ in range(seeds)]
    return texts, list(range(len(texts)))
