"""Values for settings that a config leaves to `auto`, from the model and the device. Other settings stay as they are.

    training.mixed_precision        bf16 on a CUDA device that computes in it, else no
    model.gradient_checkpointing    full for SDXL's UNet on a CUDA device, else none

On a CPU: float32, and no gradient checkpointing.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch

from diffalign.config.schema import AnyConfig, Config

C = TypeVar("C", bound=AnyConfig)


def with_precision(config: C, device: torch.device) -> C:
    """The config with a precision; chosen before anything is read, because a resumed run compares it."""
    if config.training.mixed_precision != "auto":
        return config
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    training = config.training.model_copy(update={"mixed_precision": "bf16" if able else "no"})
    return cast("C", config.model_copy(update={"training": training}))


def settled(config: Config, device: torch.device, family: str) -> Config:
    """The config without `auto`, for a base of the family "sd" or "sdxl"."""
    config = with_precision(config, device)
    if config.model.gradient_checkpointing != "auto":
        return config
    which = "full" if device.type == "cuda" and family == "sdxl" else "none"
    return config.model_copy(update={"model": config.model.model_copy(update={"gradient_checkpointing": which})})
