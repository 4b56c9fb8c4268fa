"""AdamW on bfloat16 weights without a float32 master: each update is rounded up or down at random, right in the mean.

bfloat16 has 8 bits: neighbours of 1 are 0.004 to 0.008 apart, so an update of 1e-5 rounded to nearest is always lost.
Rounded to the upper neighbour with a probability equal to the distance from the lower one, it arrives in the mean.
Moments are float32: in bfloat16 the second one would stand still as well (its steps are 1/1000 of it).

The random bits are a function of (seed, step, place of the weight), so every process of a run rounds alike and a
resumed run rounds as it would have. Weights in float32 are updated as torch's AdamW does it.
Source: arXiv 2010.06192 (Revisiting BFloat16 Training); torchao rounds so too, from the global generator.
Left out: fused kernels; a step is some 15 operations for each weight, once in an optimiser step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_LOW_BITS = 0xFFFF  # of a float32's 32 bits, what bfloat16 does not have


def round_stochastically(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A float32 tensor as bfloat16; each value becomes one of its two neighbours, whose mean is the value."""
    noise = torch.randint(_LOW_BITS + 1, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits = (x.view(torch.int32) + noise) & ~_LOW_BITS
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


def adamw_(
    p: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    step: int,
    group: dict[str, Any],
    generator: torch.Generator,
) -> None:
    """AdamW's update number `step`, from 1, of p and of its first and second moment in float32, all in place.

    group: lr, betas, eps and weight_decay. generator: rounds where p is bfloat16.
    """
    (m, v), (beta1, beta2), g = moments, group["betas"], grad.float()
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    scale = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    new = p.float() if p.dtype != torch.float32 else p
    new.mul_(1 - group["lr"] * group["weight_decay"])
    new.addcdiv_(m, scale, value=-group["lr"] / (1 - beta1**step))
    if new is not p:
        p.copy_(round_stochastically(new, generator))


class StochasticAdamW(torch.optim.Optimizer):
    """torch's AdamW (decoupled decay, bias correction) for weights of which some are bfloat16."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every weight that has a gradient."""
        loss = None if closure is None else closure()
        place = 0
        for group in self.param_groups:
            for p in group["params"]:
                place += 1
                if p.grad is not None:
                    self._update(p, p.grad, group, place)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[p]
        if not state:
            # a plain number: reading it back from a device would wait
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        state["step"] += 1
        generator = self._generator(p.device, state["step"], place)
        adamw_(p, grad, (state["exp_avg"], state["exp_avg_sq"]), state["step"], group, generator)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but each state has the dtype it was saved in; torch would cast it to that of the weights."""
        super().load_state_dict(state_dict)
        ordered = [p for group in self.param_groups for p in group["params"]]
        for i, saved in state_dict["state"].items():
            p = ordered[int(i)]
            for name, value in saved.items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, copy=True)

    def _generator(self, device: torch.device, step: int, place: int) -> torch.Generator:
        generator = self._generators.setdefault(device, torch.Generator(device))
        return generator.manual_seed((self.seed * 1_000_003 + step) * 1_000_003 + place & (1 << 63) - 1)
