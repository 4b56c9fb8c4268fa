"""Which kernel computes attention in a UNet.

`unet.set_attention_backend()` does nothing on SD and SDXL UNets (their processor calls SDPA directly), so the choice
is made in an attention processor, around each SDPA call. So the recomputation of gradient checkpointing, which runs
outside any context that a training step could open, uses the kernel of the forward.

    auto        CUDA of compute capability 9 or 10: cuDNN, then flash, efficient, math; elsewhere PyTorch's own choice
                (other CUDA: flash where it can; CPU: its flash kernel)
    cudnn       cuDNN's fused attention             CUDA, half precision
    flash       FlashAttention                      CUDA in half precision, CPU
    efficient   memory-efficient attention          CUDA
    xformers    xformers' memory-efficient kernels  CUDA, package xformers
    math        plain matmuls and softmax           everywhere; slow, for comparison

All but xformers also accept one row of text for several images (`SharedText`): the two sides of a pair have one prompt.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import UNet

AttentionBackend = Literal["auto", "cudnn", "flash", "efficient", "xformers", "math"]

_KERNELS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}
_PREFER_CUDNN = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_CPU_BACKENDS = ("auto", "flash", "math")


class SharedText:
    """diffusers' SDPA processor for fewer rows of text than of images: "m tokens dim" for "k·m ...".

    Row i of the images reads row i mod m of the text. Keys and values of the text are computed once, which divides the
    cost of to_k and to_v in a cross-attention, and the memory that their backward needs, by k.
    """

    shares_text = True

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attention as the processor computes it, each row of text repeated."""
        text = encoder_hidden_states
        if text is not None and attention_mask is not None:
            text = text.repeat(len(hidden_states) // len(text), 1, 1)
        if text is None or len(text) == len(hidden_states):
            return self.processor(attn, hidden_states, text, attention_mask, temb)
        q, k, v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        copies = len(q) // len(k), 1, 1, 1
        out = functional.scaled_dot_product_attention(q, k.repeat(copies), v.repeat(copies))
        out = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return attn.to_out[1](out)


def shares_text(unet: UNet) -> bool:
    """Whether all cross-attentions of a UNet take fewer rows of text than of images."""
    layers = cross_attentions(unet)
    return bool(layers) and all(is_plain(x) and getattr(x.processor, "shares_text", False) for x in layers)


def cross_attentions(unet: UNet) -> list[Any]:
    """A UNet's cross-attention layers, in module order."""
    from diffusers.models.attention_processor import Attention

    return [layer for layer in unet.modules() if isinstance(layer, Attention) and layer.is_cross_attention]


def is_plain(layer: Any) -> bool:
    """Whether a cross-attention does what SD's and SDXL's do: project, attend, project."""
    bare = layer.norm_q is None and layer.norm_k is None and layer.group_norm is None and not layer.norm_cross
    plain = not layer.residual_connection and layer.rescale_output_factor == 1.0 and layer.spatial_norm is None
    return bool(bare and plain and layer.to_k is not None and layer.added_kv_proj_dim is None)


class PinnedAttention:
    """An SDPA processor that may use only the given kernels, in order of preference (about 16 µs a call)."""

    shares_text = True

    def __init__(self, processor: Any, backend: str, kernels: list[SDPBackend]) -> None:
        self.processor = processor
        self.backend = backend
        self.kernels = kernels

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention as the processor computes it. Raises ModelError when no allowed kernel takes these inputs."""
        try:
            with sdpa_kernel(self.kernels, set_priority=True):
                return self.processor(attn, hidden_states, *args, **kwargs)
        except RuntimeError as error:
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
            raise ModelError(
                f"attention backend {self.backend!r} has no kernel for {hidden_states.dtype} on "
                f"{hidden_states.device} with heads of {attn.inner_dim // attn.heads}; cudnn and flash need bf16 or "
                "fp16 (mixed_precision), or use attention: auto"
            ) from error


def set_attention(unet: UNet, backend: str, device: torch.device | str) -> str:
    """Sets the attention kernel of a UNet, with or without LoRA layers; returns the choice in words, for the log.

    `device` is where the UNet will run; it may be elsewhere now. Raises ModelError for a backend that is unknown or
    cannot work there.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

    device = torch.device(device)
    _check(backend, device)
    plain = SharedText(AttnProcessor2_0())
    processor: Any
    if backend == "xformers":
        processor, chosen = XFormersAttnProcessor(), backend
    elif backend != "auto":
        processor, chosen = PinnedAttention(plain, backend, _KERNELS[backend]), backend
    elif _prefers_cudnn(device):
        processor, chosen = PinnedAttention(plain, "auto", _PREFER_CUDNN), "auto: cudnn first"
    else:
        processor, chosen = plain, "auto: PyTorch's choice"
    unet.set_attn_processor(_signed(processor, processor if backend == "xformers" else plain))
    return chosen


def _signed(processor: Any, like: Any) -> Any:
    """The processor with the signature of `like` stored on it.

    Every call of a diffusers attention layer asks for the signature, and computing it takes longer than a small layer's
    arithmetic. The call itself goes to the class, past the attribute that is set here.
    """

    def call(*args: Any) -> Tensor:
        return processor(*args)

    signed: Any = call
    signed.__signature__ = inspect.signature(like.__call__)
    processor.__call__ = signed
    return processor


def _check(backend: str, device: torch.device) -> None:
    allowed: Any = get_args(AttentionBackend) if device.type == "cuda" else _CPU_BACKENDS
    if backend not in get_args(AttentionBackend):
        raise ModelError(f"attention = {backend!r} is unknown; allowed on {device.type}: {', '.join(allowed)}")
    if backend not in allowed:
        raise ModelError(
            f"attention = {backend!r} needs a CUDA device and this run is on {device.type}; allowed here: "
            f"{', '.join(allowed)}"
        )
    if backend == "xformers" and importlib.util.find_spec("xformers") is None:
        raise ModelError(
            "attention = 'xformers', but the package xformers is not installed; `pip install diffalign[xformers]`, or "
            "use attention: auto"
        )


def _prefers_cudnn(device: torch.device) -> bool:
    """Hopper and datacenter Blackwell, where cuDNN's attention is the fastest of PyTorch's."""
    if device.type != "cuda" or not torch.backends.cudnn.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)
