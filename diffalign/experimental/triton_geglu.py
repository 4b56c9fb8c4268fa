"""GEGLU, h · gelu(g) with the exact erf, from the projection's output "rows (h g)": one Triton kernel each way.

    gelu(g) = g Φ(g)        gelu'(g) = Φ(g) + g φ(g)        Φ(g) = (1 + erf(g/√2)) / 2

Computed in float32 and rounded once. Imports triton; `fused_geglu.py` imports this module when a kernel is launched.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, BLOCK, WARPS = 4, 256, 4


@triton.jit
def _tile(rows, inner, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(where h is, where the answer is, which exist) of this program's tile."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < inner)[None, :]
    start = row.to(tl.int64)[:, None] * inner
    return 2 * start + column[None, :], start + column[None, :], inside


@triton.jit
def geglu(projected, out, rows, inner, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """h · gelu(g)."""
    at, to, inside = _tile(rows, inner, ROWS, BLOCK)
    h = tl.load(projected + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(projected + at + inner, mask=inside, other=0.0).to(tl.float32)
    y = h * (0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476)))
    tl.store(out + to, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def geglu_slope(projected, grad, out, rows, inner, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dL/dh = dL/dy gelu(g) and dL/dg = dL/dy h gelu'(g), laid out as the projection."""
    at, to, inside = _tile(rows, inner, ROWS, BLOCK)
    h = tl.load(projected + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(projected + at + inner, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(grad + to, mask=inside, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * g * g)
    tl.store(out + at, (dy * (g * below)).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + inner, (dy * h * (below + g * density)).to(out.dtype.element_ty), mask=inside)


def _grid(rows: int, inner: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS), triton.cdiv(inner, BLOCK)


def forward(projected: Tensor, out: Tensor) -> None:
    """Fills `out` "… inner" from `projected` "… (2 inner)", both contiguous."""
    inner = out.shape[-1]
    rows = out.numel() // inner
    geglu[_grid(rows, inner)](projected, out, rows, inner, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS)


def backward(grad: Tensor, projected: Tensor, out: Tensor) -> None:
    """Fills `out`, of `projected`'s shape, with the slope by it; all contiguous."""
    inner = grad.shape[-1]
    rows = grad.numel() // inner
    geglu_slope[_grid(rows, inner)](projected, grad, out, rows, inner, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS)
