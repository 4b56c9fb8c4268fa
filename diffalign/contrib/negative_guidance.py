"""Diffusion-NPO (arXiv 2505.11245): guidance away from a network that was tuned on inverted preferences.

Classifier-free guidance with two networks instead of one,

    ε = ε_neg(x, ∅) + g (ε_pos(x, c) − ε_neg(x, ∅))

where the negative network computes the unconditional (or negative-prompt) branch. It is trained with
`data.invert_preference: true`. For a tuned positive network θ + η the negative one is θ + aη + bδ, where δ is the
change from the inverted training: branches that have moved far apart make guidance noisy. `diffalign merge` writes such
a sum. The release has b = 1 and, with its option merge_weight = w (0 by default), a = w in gen.py (SD1.5) and
a = 1 − w in gen_xl.py (SDXL), so that its two defaults are the two extremes. Here the user chooses a and b.

Each branch is a batch of half the size: up to the rounding of kernels at another batch size, two equal networks give
the images of one. The cost is a second UNet in memory; time stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.models.adapters.save_load import find_tuned, load_tuned
from diffalign.models.loading.base import load_base
from diffalign.models.loading.family import ModelError
from diffalign.models.spec import ModelSpec


def load_negative(
    model: str | Path | ModelSpec,
    negative_tuned: str,
    *,
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The base's UNet with tuned weights (full or LoRA, as `find_tuned` takes them), for the negative branch.

    Raises ModelError when they do not fit the base, need a user, or tune text encoders too: the positive pipeline
    encodes the text.
    """
    layout = find_tuned(negative_tuned).layout
    if layout.needs_user:
        raise ModelError(
            f"{negative_tuned} is {layout.label}, and a negative network cannot have a user; use other weights"
        )
    base = load_base(model, vae_and_text=False, torch_dtype=torch_dtype)
    load_tuned(base.unet, negative_tuned)
    return base.unet.requires_grad_(False).eval().to(device, torch_dtype)


@dataclass(frozen=True)
class NegativeGuidance:
    """Guidance with a second network; the `Guidance` of `diffalign.evaluation`."""

    network: nn.Module

    def on(self, pipe: Any) -> AbstractContextManager[None]:
        """`negative_branch` with the network."""
        return negative_branch(pipe, self.network)


def load_guidance(
    model: str | Path | ModelSpec, weights: str, *, torch_dtype: torch.dtype, device: torch.device | str
) -> NegativeGuidance:
    """Guidance with the network of `load_negative`."""
    return NegativeGuidance(load_negative(model, weights, torch_dtype=torch_dtype, device=device))


@contextmanager
def negative_branch(pipeline: Any, negative: nn.Module) -> Iterator[None]:
    """Within the block, `negative` computes the unconditional half of a diffusers pipeline's guidance.

    Inside, calls without guidance (guidance_scale ≤ 1) raise ModelError: they have no such half.
    """
    unet = pipeline.unet
    positive = unet.forward

    def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **inputs: Any) -> Any:
        if not pipeline.do_classifier_free_guidance:
            raise ModelError(
                "a negative network computes the unconditional branch, which "
                "guidance_scale ≤ 1 does not have; set guidance_scale above 1"
            )
        # diffusers stacks (unconditional, conditional) along the batch, and splits the prediction in the same places
        halves = zip(*(x.chunk(2) for x in (sample, encoder_hidden_states)), _halves(inputs), strict=True)
        answers = [
            network(x, timestep, text, **{**rest, "return_dict": False})[0]
            for network, (x, text, rest) in zip((negative, positive), halves, strict=True)
        ]
        return (torch.cat(answers),)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward  # the class's forward is visible again


def _halves(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """A pipeline's other arguments for each half: SDXL's pooled text and sizes are split, the rest is shared."""
    added = inputs.get("added_cond_kwargs") or {}
    split = {name: x.chunk(2) for name, x in added.items()}
    return [
        {**inputs, "added_cond_kwargs": {name: x[half] for name, x in split.items()} if split else None}
        for half in range(2)
    ]
