"""What a latent judge reads besides latents: tokens of prompts, and SDXL's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.contrib.latent_judge.files import Facts


def tokens(
    tokenizers: Sequence[Any], prompts: Sequence[str], device: torch.device
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Of each tokenizer the tokens "prompt tokens" of the distinct prompts and, last, of the null prompt "".

    And int64 [n]: which of them each of `prompts` is. Prompts are cut to the text encoder's context, and "" is encoded
    like any other prompt, as in the release; also where the base guides with zeros.
    """
    distinct = list(dict.fromkeys(prompts))
    place = {prompt: i for i, prompt in enumerate(distinct)}
    ids = [
        tokenizer(
            [*distinct, ""],
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids.to(device)
        for tokenizer in tokenizers
    ]
    return tuple(ids), torch.tensor([place[prompt] for prompt in prompts], device=device)


def time_ids(facts: Facts, latents: Tensor) -> Tensor | None:
    """SDXL's six numbers, float32 [6], of images made at the latents' size and not cropped; None for SD."""
    if facts.family == "sd":
        return None
    height, width = (int(size) * facts.pixels_per_latent for size in latents.shape[-2:])
    return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=latents.device)
