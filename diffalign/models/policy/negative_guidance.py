"""Diffusion-NPO (arXiv 2505.11245): guidance away from a network that was tuned on inverted preferences.

Classifier-free guidance with two networks instead of one,

    ε = ε_neg(x, ∅) + g (ε_pos(x, c) − ε_neg(x, ∅))

where the unconditional (or negative-prompt) branch is answered by the negative network. That one is trained with
`data.invert_preference: true`. In front of a tuned positive network θ + η the negative one is θ + aη + bδ, δ being
what the inverted training changed: branches that have drifted apart make guidance noisy. `merge.py` makes it. The
release has b = 1 and, with its option merge_weight = w (0 by default), a = w in gen.py (SD1.5) and a = 1 − w in
gen_xl.py (SDXL), so that its two defaults are the two ends; here it is the user's to say.

Both branches keep their own batch of half the size: up to the rounding of kernels at another batch size, two equal
networks give what one gives. The cost is a second UNet in memory, not in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    """The base's UNet with tuned weights (full or LoRA, as `find_tuned` takes them), to answer the negative branch.

    Raises ModelError when they do not fit the base, or tune text encoders too: the text is the positive pipeline's.
    """
    if find_tuned(negative_tuned).kind == "user":
        raise ModelError(
            f"{negative_tuned} is user attention, and a negative network cannot have a user; use other weights"
        )
    base = load_base(model, vae_and_text=False, torch_dtype=torch_dtype)
    load_tuned(base.unet, negative_tuned)
    return base.unet.requires_grad_(False).eval().to(device, torch_dtype)


@contextmanager
def negative_branch(pipeline: Any, negative: nn.Module) -> Iterator[None]:
    """Within the block, `negative` answers the unconditional half of a diffusers pipeline's guidance.

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
        # diffusers stacks (unconditional, conditional) along the batch and splits the answer in the same places
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
        del unet.forward  # the instance's own, which hid the class's


def _halves(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """A pipeline's other arguments for each half: SDXL's pooled text and sizes are split, the rest is shared."""
    added = inputs.get("added_cond_kwargs") or {}
    split = {name: x.chunk(2) for name, x in added.items()}
    return [
        {**inputs, "added_cond_kwargs": {name: x[half] for name, x in split.items()} if split else None}
        for half in range(2)
    ]
