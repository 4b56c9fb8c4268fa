"""AdamW on bfloat16 weights with moments of 8 bits: 2.03 bytes of state for a weight in place of 8.

A moment is stored in blocks of 256 numbers: the block's largest magnitude in float32, and for each number the code of
x / largest in a table of 256 values that lie denser towards 0. With i = 0..6 decades and k = 0..n_i - 1 in each, the
values are the centres of n_i equal parts of [0.1, 1], in the decade's size, and 0 and 1:

    10^(i-6) (0.1 + 0.9 (k + 1/2) / n_i)      n_i = 2^i with either sign (first moment), 2^(i+1) (second, no sign)

Source: arXiv 2110.02861 (8-bit Optimizers via Block-wise Quantization), sections 2.1 and 2.2; the tables are those of
bitsandbytes and torchao. Steps are made as there: decode, AdamW in float32, encode. We differ in the second moment:

- Its codes are rounded at random to one of the two neighbours, right in the mean. A step moves it by 1/1000 and
  neighbours lie 1/100 to 1/10 apart: rounded to the nearest it stands still when the sizes of gradients within a block
  change among themselves, and the weights' steps stay wrong by a factor.
- What is not 0 is never stored as 0, but at least as the smallest value, 3e-7 of the block's largest. As 0 it leaves a
  first moment divided by epsilon, which is an update thousands of times too large.

As in `stochastic_rounding.py` every random bit is a function of (seed, step, place of the weight). Tensors of fewer
than 4096 numbers have float32 moments. A parameter is updated in pieces of 2^22 numbers, which bounds the temporary
memory. It is here beside torchao's AdamW8bit because its weights are nearer to AdamW's and its bits repeat
(`benchmarks/results/eight_bit.md`).
Left out: a fused kernel; bitsandbytes' percentile clipping and its stable embedding.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffalign.training.optim.stochastic_rounding import StochasticAdamW, adamw_

BLOCK = 256  # numbers that share a scale
SMALL = 4096  # parameters with fewer numbers have float32 moments, as in bitsandbytes and torchao
PIECE = 1 << 22  # numbers of a parameter that are updated at once, a multiple of BLOCK


@cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 float32 values of the codes, ascending, in [-1, 1] or [0, 1]."""
    values = [0.0, 1.0]
    for i in range(7):
        n = 2**i if signed else 2 ** (i + 1)
        for k in range(n):
            value = 10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / n)
            values += [value, -value] if signed else [value]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def _midpoints(device: torch.device) -> Tensor:
    table = dynamic_map(True, device)
    return (table[1:] + table[:-1]) / 2


def encode(x: Tensor, signed: bool, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Codes (uint8, as long as x) and scales (float32, one for each 256) of a flat float32 tensor.

    signed: to the nearest value. Else x >= 0, to one of its two neighbours at random, and never from above 0 to 0.
    """
    short = -len(x) % BLOCK
    blocks = torch.nn.functional.pad(x, (0, short)).view(-1, BLOCK) if short else x.view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    share = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    if signed:
        codes = torch.bucketize(share, _midpoints(x.device), out_int32=True)
    else:
        codes = _to_a_neighbour(share, dynamic_map(False, x.device), generator)
    return codes.to(torch.uint8).flatten()[: len(x)], scales


def _to_a_neighbour(share: Tensor, table: Tensor, generator: torch.Generator | None) -> Tensor:
    above = torch.bucketize(share, table, out_int32=True).clamp_(1, len(table) - 1)
    upper = table.index_select(0, above.flatten()).view_as(share)
    lower = table.index_select(0, above.flatten() - 1).view_as(share)
    chance = torch.rand(share.shape, generator=generator, device=share.device)
    return (above - (chance * (upper - lower) >= share - lower).int()).clamp_(min=1)


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The flat float32 numbers that codes and scales stand for."""
    values = dynamic_map(signed, codes.device).index_select(0, codes.int())
    return values.mul_(scales.repeat_interleave(BLOCK)[: len(codes)])


class EightBitAdamW(StochasticAdamW):
    """`StochasticAdamW` with moments of 8 bits; of a large weight the state holds codes and scales of each."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, which calls it for each group that it is made with."""
        super().add_param_group(param_group)
        for device in {p.device for p in self.param_groups[-1]["params"]}:
            _midpoints(device), dynamic_map(False, device)  # here, because a copy to a device waits for it

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any], place: int) -> None:
        if p.numel() < SMALL:
            super()._update(p, grad, group, place)
            return
        state = self.state[p]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(p.numel(), dtype=torch.uint8, device=p.device)
                state[f"{name}_scale"] = torch.zeros(-(-p.numel() // BLOCK), dtype=torch.float32, device=p.device)
        state["step"] += 1
        generator = self._generator(p.device, state["step"], place)
        weights, gradients = p.view(-1) if p.is_contiguous() else p.flatten(), grad.flatten()
        for start in range(0, p.numel(), PIECE):
            here, scales = slice(start, start + PIECE), slice(start // BLOCK, (start + PIECE) // BLOCK)
            m = decode(state["exp_avg"][here], state["exp_avg_scale"][scales], True)
            v = decode(state["exp_avg_sq"][here], state["exp_avg_sq_scale"][scales], False)
            adamw_(weights[here], gradients[here], (m, v), state["step"], group, generator)
            state["exp_avg"][here], state["exp_avg_scale"][scales] = encode(m, True)
            state["exp_avg_sq"][here], state["exp_avg_sq_scale"][scales] = encode(v, False, generator)
        if not p.is_contiguous():  # channels last: codes are in the order of the indices all the same
            p.copy_(weights.view_as(p))
