"""A UNet's forward on the `meta` device as a GPU computes it: no weights, no arithmetic, every tensor that is made.

`meta` knows neither autocast nor fused attention. Both are put in their place here, so that what a forward stores can
be counted for a model of any size on any machine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffalign.models.kernels.checkpointing import store_for_autocast
from diffalign.models.kernels.quantized import QuantizedLinear


class FusedAttention:
    """Attention with one operation for the product, as a fused kernel has it; `meta` knows only the plain form."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As diffusers' AttnProcessor2_0 for the UNets of SD and SDXL."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = [
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        ]
        out = torch.ops.aten._scaled_dot_product_flash_attention(*heads)[0]
        projected: Tensor = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(-2)))
        return projected


def cast_as_autocast(unet: nn.Module) -> nn.Module:
    """Makes a UNet cast as CUDA's autocast to bfloat16 does: its weights become bfloat16, norms compute in float32.

    In place; returns it. The flags requires_grad stay.
    """
    trained = [p.requires_grad for p in unet.parameters()]
    store_for_autocast(unet.requires_grad_(False), torch.bfloat16)
    for p, was in zip(unet.parameters(), trained, strict=True):
        p.requires_grad_(was)
    for layer in unet.modules():
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            layer.register_forward_pre_hook(_norm_casts)
        elif isinstance(layer, nn.Linear | nn.Conv2d | QuantizedLinear) or hasattr(layer, "base_layer"):
            layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].to(torch.bfloat16), *inputs[1:]))
    return unet


def _norm_casts(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Autocast computes torch's norms in float32; one whose class was swapped (fused kernels) casts as it likes."""
    return (inputs[0].to(torch.float32), *inputs[1:]) if type(layer) in (nn.GroupNorm, nn.LayerNorm) else None


def unet_inputs(unet: Any, rows: int, side: int, device: str = "meta", prompts: int | None = None) -> dict[str, Any]:
    """Random arguments of a forward over rows of latents with `side` x `side` places; by default each has a prompt."""
    config = unet.config

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    found: dict[str, Any] = {
        "sample": normal(rows, config.in_channels, side, side),
        "timestep": torch.full((rows,), 500, device=device),
        "encoder_hidden_states": normal(prompts or rows, 77, config.cross_attention_dim),
        "return_dict": False,
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        ids = torch.tensor([8.0 * side, 8.0 * side, 0.0, 0.0, 8.0 * side, 8.0 * side], device=device)
        found["added_cond_kwargs"] = {"text_embeds": normal(rows, pooled), "time_ids": ids.expand(rows, 6)}
    return found


def half_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same in bfloat16, as `Networks` gives them to a network under autocast."""
    return {
        name: x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
