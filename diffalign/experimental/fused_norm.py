"""GroupNorm and SiLU as one function, for channels-last activations: moves and stores less memory than torch.

    out = silu(γ (x - mean) / √(var + ε) + β)        mean and variance over a group of one image

Stored for the backward are the input x, and mean and rstd of each group; the normalised values and SiLU's derivative
are recomputed. Under autocast torch's own group_norm casts x to float32 and stores that, stores its float32 output for
SiLU, and the convolution then casts SiLU's. Here the sums are float32 as well, and the output is rounded once, to the
dtype in which the next layer computes, exactly as its cast would round.

Without CUDA or Triton, and for inputs that the kernels do not support (float64, NCHW), torch's own functions run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffalign.experimental.kernels import computed_in, unavailable

NHWC = torch.channels_last


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, silu: bool = True
) -> Tensor:
    """The answer "n c h w" in autocast's dtype, or in x's without autocast; `silu=False` leaves the SiLU out."""
    dtype = computed_in(x)
    if unavailable(x) is not None or x.ndim != 4 or not x.is_contiguous(memory_format=NHWC) or x.numel() == 0:
        return group_norm_silu_eager(x, groups, weight, bias, eps, silu=silu)
    return _GroupNormSiLU.apply(x, weight, bias, groups, eps, silu, dtype)


def group_norm_silu_eager(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, silu: bool = True
) -> Tensor:
    """The same function in torch's own: the fallback, and what the kernels are tested against."""
    y = F.group_norm(x, groups, weight, bias, eps)
    return (F.silu(y) if silu else y).to(computed_in(x))


class _GroupNormSiLU(torch.autograd.Function):
    """The kernels of triton_norm.py. On `meta` nothing is launched: the stored bytes can be counted without a GPU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, dtype: torch.dtype
    ) -> Tensor:
        out = torch.empty_like(x, dtype=dtype, memory_format=NHWC)
        mean, rstd = (torch.empty((len(x), groups), dtype=torch.float32, device=x.device) for _ in range(2))
        if x.device.type != "meta":
            from diffalign.experimental import triton_norm

            with torch.cuda.device_of(x):  # Triton launches on the current device
                triton_norm.forward(x, weight, bias, out, mean, rstd, eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.silu = silu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        out = torch.empty_like(x, memory_format=NHWC)
        sums = torch.empty((len(x), 2, x.shape[1]), dtype=torch.float32, device=x.device)
        if x.device.type != "meta":
            from diffalign.experimental import triton_norm

            grad = grad.contiguous(memory_format=NHWC)
            with torch.cuda.device_of(x):  # Triton launches on the current device
                triton_norm.backward(grad, x, weight, bias, mean, rstd, out, sums, ctx.silu)
        grad_weight = sums[:, 1].sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = sums[:, 0].sum(0).to(bias.dtype) if ctx.needs_input_grad[2] else None
        return out, grad_weight, grad_bias, None, None, None, None
