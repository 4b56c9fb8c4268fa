"""Spending less memory without changing a number: gradient checkpointing, and frozen weights in the autocast dtype."""

from __future__ import annotations

import torch
from torch import nn

# What autocast runs in half precision, on CPU and CUDA alike, and a UNet has weights in. Norms stay out: they compute
# in, or mix with, float32.
_AUTOCAST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


def set_checkpointing(unet: nn.Module, enabled: bool) -> None:
    """Recompute each block's activations in the backward pass instead of keeping them (6.4 -> 0.6 GB at 1024 px).

    Loss and gradient stay the same; a step costs one more forward.
    """
    if enabled:
        unet.enable_gradient_checkpointing()
    else:
        unet.disable_gradient_checkpointing()


def store_for_autocast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Keep the frozen weights that autocast would cast at every call in `dtype`, and everything else as it is.

    Under autocast to the same dtype the outputs do not change by one bit, at half the memory and without the casts.
    Trainable parameters (LoRA's) are left alone. In place; returns the module, which from now on must be called under
    autocast (sampling included).
    """
    for layer in module.modules():
        if isinstance(layer, _AUTOCAST_LAYERS):
            for parameter in layer.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
    return module
