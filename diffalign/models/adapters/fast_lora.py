"""peft's LoRA layer on a linear one, computed in three matmuls forward and five backward.

    y = W x + b + (α/r) · B (A x)

peft spends a linear layer on each of W, A and B, a product and a sum on top, and autograd a node on every one of them:
SDXL has 560 such layers, and a forward with them takes twice the operators of one without. Here the last matmul adds
the update itself, and one node goes back through all of it.

DoRA's layer (`dora.py`) has a forward of its own as well: peft's computes the lengths of rows in the dtype of the
input, so that under autocast they would differ from those at the start and the policy from its reference.

The layer stays peft's in all else: names, files, merging, switching off. Where it is not plain (dropout in training,
several adapters, another variant, a merged update, a base in another dtype than the input is computed in) peft's
own forward runs. With the adapter off the same kernel is called as with it on, so that at B = 0 both agree to the bit.

Imports peft; the package imports this module only when a LoRA is added.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffalign.models.adapters.dora import row_lengths


class LoraLinear(Linear):
    """A peft LoRA layer with another forward; `fuse` makes them out of peft's.

    in_place: add the update to the base layer's output in place. Selective checkpointing stores that output unchanged.
    """

    in_place: bool = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's answer "... out" for x "... in"; further arguments are peft's."""
        # Dictionaries, not attributes: nn.Module.__getattr__ is the larger part of a small layer's time.
        own = self.__dict__
        modules: dict[str, Any] = self._modules  # all of them there
        base = modules["base_layer"]._parameters
        kind = x.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        if args or kwargs or own["merged_adapters"] or base["weight"].dtype != dtype:
            return super().forward(x, *args, **kwargs)
        if own["_disable_adapters"]:
            return _linear(x.to(dtype), base["weight"], base["bias"])
        active = own["_active_adapter"]
        name = active if isinstance(active, str) else active[0] if len(active) == 1 else ""
        if name not in modules["lora_A"]._modules or name in own["lora_variant"] or self._drops(name):
            return super().forward(x)
        a = modules["lora_A"]._modules[name]._parameters["weight"]
        b = modules["lora_B"]._modules[name]._parameters["weight"]
        if autocast:
            x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
        elif a.dtype != dtype:
            return super().forward(x)
        return _LoraLinear.apply(x, base["weight"], base["bias"], a, b, own["scaling"][name], own.get("in_place", True))

    def _drops(self, name: str) -> bool:
        parts: dict[str, Any] = self._modules
        dropout = parts["lora_dropout"]._modules[name]
        return self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0


class DoraLinear(Linear):
    """A peft DoRA layer with another forward; at m = ‖W + s B A‖ and B = 0 it is its base to the bit."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's answer "... out" for x "... in"; further arguments are peft's."""
        own = self.__dict__
        modules: dict[str, Any] = self._modules
        base = modules["base_layer"]._parameters
        kind = x.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        if args or kwargs or own["merged_adapters"] or base["weight"].dtype != dtype:
            return super().forward(x, *args, **kwargs)
        weight, bias = base["weight"], base["bias"]
        if own["_disable_adapters"]:
            return _linear(x.to(dtype), weight, bias)
        active = own["_active_adapter"]
        name = active if isinstance(active, str) else active[0] if len(active) == 1 else ""
        if name not in modules["lora_magnitude_vector"]._modules:
            return super().forward(x)
        a = modules["lora_A"]._modules[name]._parameters["weight"]
        b = modules["lora_B"]._modules[name]._parameters["weight"]
        if not autocast and a.dtype != dtype:
            return super().forward(x)
        scale = own["scaling"][name]
        gain = modules["lora_magnitude_vector"]._modules[name]._parameters["weight"] / row_lengths(weight, a, b, scale)
        rows = x.to(dtype).reshape(-1, x.shape[-1])
        out = _linear(rows, weight, bias)
        update = rows.mm(a.to(dtype).t()).mm(b.to(dtype).t())
        change = (gain - 1) * (out if bias is None else out - bias) + gain * scale * update  # float32
        return (out + change.to(dtype)).view(*x.shape[:-1], -1)


def fuse(network: nn.Module) -> None:
    """Gives every LoRA layer on a linear one this forward, where the base is frozen and the layer is peft's plain kind.

    DoRA's layers get theirs. In place. Nothing of a layer but its class changes.
    """
    for layer in network.modules():
        if type(layer) is Linear and type(layer.base_layer) is nn.Linear and not layer.base_layer.weight.requires_grad:
            plain = not any(layer.lora_bias.values()) and not layer.fan_in_fan_out
            if plain:
                layer.__class__ = DoraLinear if len(layer.lora_magnitude_vector) else LoraLinear


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b, always as one matmul of flattened rows.

    torch's own linear chooses between kernels that round differently by strides and by what requires grad.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = rows.mm(weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return out.view(*x.shape[:-1], -1)


class _LoraLinear(torch.autograd.Function):
    """W x + b + s · B (A x) for a frozen W and b. All tensors have one dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, in_place: bool
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = rows.mm(weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        down = rows.mm(a.t())
        if in_place:
            out.addmm_(down, b.t(), alpha=scale)
        else:
            out = out.addmm(down, b.t(), alpha=scale)
        ctx.save_for_backward(rows, weight, a, b, down)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, down = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        up, grad_b = grad.mm(b), grad.t().mm(down)
        if ctx.scale != 1.0:  # alpha = rank, the default
            up, grad_b = up.mul_(ctx.scale), grad_b.mul_(ctx.scale)
        grad_a = up.t().mm(rows)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.mm(weight).addmm_(up, a).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None
