"""Frozen linear layers stored in 8 or 4 bits, and computed with in the dtype of their input: a LoRA trains on them.

    int8   one code in [-127, 127] for a weight, one float32 scale for an output row: the row's largest weight / 127
    nf4    two codes in a byte; 64 neighbours in a row-major weight share the largest |w| as float32 scale; the values
           are QLoRA's (arXiv 2305.14314, appendix E)

Codes are restored to the dtype of the product for each call, forward and backward, and not kept for the backward. Both
sides of an objective's comparison, policy and LoRA-off reference, compute with the same restored weights.

bitsandbytes and torchao have such layers. Ours are here because either package makes every import of peft three times
as slow and brings LoRA layers of its own, bitsandbytes' int8 also rounds activations, and a rounding that is the same
on every device keeps a run's margins at 0 where it starts. Left out: convolutions, and a second quantisation of the
scales, which would save .4 bits of nf4's 4.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Kind = Literal["int8", "nf4"]
BLOCK = 64  # weights of nf4 that share a scale
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def to_codes(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales of a weight "out in".

    int8: codes "out in" and scales "out 1". nf4: codes uint8 "out·in/2", the first of a pair in the high bits, and
    scales "out·in/64"; the number of weights must be a multiple of 64.
    """
    weight = weight.float()
    if kind == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8), scale
    blocks = weight.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1)
    share = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    table = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(share, (table[1:] + table[:-1]) / 2).to(torch.uint8).flatten()
    return codes[::2] * 16 + codes[1::2], scale


def from_codes(codes: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight "out columns" that codes and scales stand for: the float32 product, rounded once."""
    if codes.dtype == torch.int8:
        return (codes * scale).to(dtype)
    table = torch.tensor(NF4, device=codes.device)
    both = torch.stack([codes >> 4, codes & 15], dim=1).view(-1, BLOCK)
    return (table[both.int()] * scale[:, None]).to(dtype).view(-1, columns)


class QuantizedLinear(nn.Module):
    """A frozen `nn.Linear` whose weight is stored as codes. Under autocast it computes in autocast's dtype."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, kind: Kind) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        codes, scale = to_codes(linear.weight.detach(), kind)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @property
    def weight(self) -> Tensor:
        """The weight that it computes with, float32 "out in"; restored at each call."""
        return from_codes(self.codes, self.scale, self.in_features, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """W x + b of x "... in"."""
        device = x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        out: Tensor = _Product.apply(x.to(dtype), self.codes, self.scale, self.bias)
        return out

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class _Product(torch.autograd.Function):
    """W x + b, one matmul of flattened rows each way; W is restored for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.columns = x.shape[-1]
        rows = x.reshape(-1, x.shape[-1])
        weight = from_codes(codes, scale, rows.shape[1], x.dtype)
        out = rows.mm(weight.t()) if bias is None else torch.addmm(bias.to(x.dtype), rows, weight.t())
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = rows.mm(from_codes(codes, scale, ctx.columns, grad.dtype)).view(*grad.shape[:-1], -1)
        return grad_x, None, None, None


def quantize(network: nn.Module, kind: Kind) -> int:
    """Stores the frozen linear layers of a network's transformer blocks as codes, in place; returns how many weights.

    A LoRA on such a layer stays. Layers outside the transformer blocks (time and size embeddings, less than 3 % of an
    SDXL UNet) keep their weights, and so do those that nf4's blocks do not divide.
    """
    count = 0
    for parent, name, linear in list(_linears(network)):
        if kind == "int8" or linear.weight.numel() % BLOCK == 0:
            setattr(parent, name, QuantizedLinear(linear, kind))
            count += linear.weight.numel()
    return count


def _linears(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for prefix, parent in network.named_modules():
        if ".lora_" in f".{prefix}." or "attentions" not in prefix.split("."):
            continue
        for name, child in parent.named_children():
            if type(child) is nn.Linear and not child.weight.requires_grad:
                yield parent, name, child
