"""Random weights of a released layout, and image preparation stated without PIL's crop and without our code."""

from __future__ import annotations

import torch


def random_state(shapes, seed=0, scale=0.2):
    """Float32 tensors of these shapes: norms near 1, `scale` elsewhere; a buffer of positions where one is named so."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        value = scale * torch.randn(shape, generator=generator)
        is_norm = name.endswith("weight") and len(shape) == 1
        state[name] = torch.arange(shape[-1]).expand(shape) if "position_ids" in name else value + float(is_norm)
    return state


def on_meta(shapes):
    """Tensors of these shapes without memory."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
