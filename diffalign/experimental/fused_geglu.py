"""GEGLU as one function: h · gelu(g) with the exact erf, where the projection's output is (h, g) side by side.

Only the projection's output is stored for the backward; gelu(g), which torch stores for the product, is recomputed.
Computed in float32 and rounded once, where torch rounds gelu(g) before the product.

Without CUDA or Triton, and for float64, torch's own functions run. (GEGLU by tanh, as other kernel libraries have
it, is another function than the one SD and SDXL were trained with.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffalign.experimental.kernels import unavailable


def geglu(projected: Tensor) -> Tensor:
    """ "… inner" from "… (2 inner)", in its dtype."""
    if unavailable(projected) is not None or projected.numel() == 0:
        return geglu_eager(projected)
    return _Geglu.apply(projected)


def geglu_eager(projected: Tensor) -> Tensor:
    """The same function in torch's own: the fallback, and what the kernels are tested against."""
    h, gate = projected.chunk(2, dim=-1)
    return h * F.gelu(gate)


class _Geglu(torch.autograd.Function):
    """The kernels of triton_geglu.py. On `meta` nothing is launched."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        projected = projected.contiguous()
        out = projected.new_empty((*projected.shape[:-1], projected.shape[-1] // 2))
        if projected.device.type != "meta":
            from diffalign.experimental import triton_geglu

            with torch.cuda.device_of(projected):  # Triton launches on the current device
                triton_geglu.forward(projected, out)
        ctx.save_for_backward(projected)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        out = torch.empty_like(projected)
        if projected.device.type != "meta":
            from diffalign.experimental import triton_geglu

            with torch.cuda.device_of(projected):  # Triton launches on the current device
                triton_geglu.backward(grad.contiguous(), projected, out)
        return out
