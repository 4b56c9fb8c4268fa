"""Less memory for the same numbers: gradient checkpointing, and frozen weights in the autocast dtype.

Also the place of weights in memory: their addresses and their format.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from diffalign.models.loading.modules import UNet

Checkpointing = Literal["none", "selective", "full"]
ALIGNMENT = 64  # bytes; of all that torch allocates on a CPU

# Expensive operators. Attention by plain matmuls (`attention: math`) stores its scores, as it does without this.
_KEPT = {
    getattr(torch.ops.aten, name)
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(torch.ops.aten, name)
}

# What autocast runs in half precision, on CPU and CUDA alike, and a UNet has weights in. Norms stay out: they compute
# in, or mix with, float32.
AUTOCAST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


def set_checkpointing(unet: UNet, which: Checkpointing) -> None:
    """Which activations of each resnet and transformer block are stored for the backward, and which are recomputed.

        none        all are stored
        selective   the outputs of matmuls, convolutions and attention are stored; norms, activations, sums and products
                    are recomputed, which costs almost no arithmetic
        full        only a block's inputs are stored; a step costs one more forward

    Loss and gradient stay the same.
    """
    layer: Any
    for layer in unet.modules():
        if hasattr(type(layer), "in_place"):  # a LoRA layer: a stored output must not be written to
            layer.in_place = which != "selective"
    if which == "none":
        unet.disable_gradient_checkpointing()
    elif which == "full":
        unet.enable_gradient_checkpointing()
    else:
        unet.enable_gradient_checkpointing(_keep_products)


def _keep_products(block: nn.Module, *inputs: Any) -> Any:
    """Calls a block; of what its backward pass needs, only outputs of `_KEPT` stay in memory."""
    return checkpoint(
        block.__call__,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(_policy),
    )


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.overloadpacket in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def store_for_autocast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Keep the frozen weights that autocast would cast at every call in `dtype`, and everything else as it is.

    Under autocast to the same dtype the outputs do not change by one bit, at half the memory and without the casts.
    Trainable parameters (LoRA's) are left alone. In place; returns the module, which from now on must be called under
    autocast (sampling included).
    """
    for layer in module.modules():
        if isinstance(layer, AUTOCAST_LAYERS):
            for parameter in layer.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
    return module


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to `device`, every parameter at an address that is a multiple of 64 bytes. In place; returns it.

    Weights mapped from a file lie where the file has them. Some CPU kernels choose their order of sums by the address,
    so that a copy of such a network, in memory of its own, may differ from it in the last bits.
    """
    module.to(device)
    for parameter in module.parameters():
        if parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
    return module


def memory_format(module: nn.Module) -> torch.memory_format:
    """channels_last where the convolutions' weights are laid out so (`module.to(memory_format=…)`), else contiguous."""
    nhwc = torch.channels_last
    laid_out = (
        p.is_contiguous(memory_format=nhwc) and not p.is_contiguous() for p in module.parameters() if p.ndim == 4
    )
    return nhwc if any(laid_out) else torch.contiguous_format
