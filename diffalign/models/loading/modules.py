"""Types of the networks of diffusers and transformers, as far as diffalign uses them.

Neither library declares such types. The classes are for annotations alone: no network is an instance of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class UNet(nn.Module):
    """A diffusers UNet2DConditionModel, with or without peft's layers."""

    config: Any  # its fields as attributes and as keys
    peft_config: dict[str, Any]  # by adapter; only with an adapter
    add_adapter: Callable[..., None]
    set_attn_processor: Callable[[Any], None]
    enable_gradient_checkpointing: Callable[..., None]
    disable_gradient_checkpointing: Callable[[], None]
    save_pretrained: Callable[..., None]


class VAE(nn.Module):
    """A diffusers autoencoder."""

    config: Any
    encode: Callable[..., Any]
    decode: Callable[..., Any]


class TextModel(nn.Module):
    """A CLIP text model of transformers, without or with its projection."""

    config: Any
