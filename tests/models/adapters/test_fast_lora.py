"""The forward of our LoRA layer against peft's, and both against a float64 sum."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign.models.adapters.fast_lora import LoraLinear
from diffalign.models.adapters.lora import add_lora, fuse_lora, lora_layers
from diffalign.models.policy.reference import LoraOff
from tests.models.conftest import Model, move_lora


def layers(bias: bool = True, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """(fused, peft's) on the same weights, B not zero."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias=bias).requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, init_lora_weights=False)
    theirs = Linear(base, "default", config, r=3, lora_alpha=6)
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7)])
def test_answer_and_gradients_are_the_written_sum(bias: bool, shape: tuple[int, ...]) -> None:
    ours, theirs = layers(bias)
    assert type(ours) is LoraLinear
    x = torch.randn(*shape, 6, requires_grad=True)
    y, z = x.detach().clone().requires_grad_(), x.detach().double().requires_grad_()
    a, b = (m["default"].weight.detach().double().requires_grad_() for m in (theirs.lora_A, theirs.lora_B))
    weight = theirs.base_layer.weight.double() + 2.0 * b @ a
    exact = z @ weight.T + (theirs.base_layer.bias.double() if bias else 0.0)
    slope = torch.randn(*shape, 5)
    for out in (ours(x), theirs(y), exact):
        (out * slope.to(out.dtype)).sum().backward()
    for out in (ours(x), theirs(y)):
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    for layer, inputs in ((ours, x), (theirs, y)):
        grads = (inputs.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad)
        for grad, true in zip(grads, (z.grad, a.grad, b.grad), strict=True):
            torch.testing.assert_close(grad.double(), true, rtol=1e-5, atol=1e-5)
    assert ours.base_layer.weight.grad is None


def test_what_is_not_plain_is_pefts_own() -> None:
    """Merged, with dropout in training, in another dtype than the base: bitwise what peft gives."""
    x = torch.randn(4, 6)
    ours, theirs = layers()
    for layer in (ours, theirs):
        layer.merge()
    assert torch.equal(ours(x), theirs(x))
    ours, theirs = layers(dropout=0.5)
    answers = []
    for layer in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        answers.append(layer(x))
    assert torch.equal(*answers)
    ours, theirs = layers()
    for layer in (ours, theirs):
        layer.base_layer.to(torch.bfloat16)
    assert torch.equal(ours(x.bfloat16()), theirs(x.bfloat16()))


def test_layers_whose_base_is_trained_keep_pefts_forward() -> None:
    _, theirs = layers()
    theirs.base_layer.weight.requires_grad_(True)
    fuse_lora(theirs)
    assert type(theirs) is not LoraLinear


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_at_b_zero_it_is_the_reference_to_the_bit(model: Model, dtype: torch.dtype | None) -> None:
    from diffalign.models.kernels.checkpointing import store_for_autocast
    from diffalign.models.policy.networks import Networks

    unet = model.unet()
    add_lora(unet, rank=4, seed=1)
    fuse_lora(unet)
    assert {type(layer) for layer in lora_layers(unet)} == {LoraLinear}
    if dtype is not None:
        store_for_autocast(unet, dtype)
    networks = Networks(
        unet,
        family=model.base.family,
        schedule=model.base.schedule,
        reference=LoraOff(unet),
        autocast_dtype=dtype,
    )
    reference = networks.reference(model.xt, model.t, model.cond)
    assert torch.equal(networks.policy(model.xt, model.t, model.cond), reference)
    move_lora(unet)
    assert not torch.equal(networks.policy(model.xt, model.t, model.cond), reference)
    assert torch.equal(networks.reference(model.xt, model.t, model.cond), reference)


class Operators(TorchDispatchMode):
    """Counts the operators below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_fewer_operators_than_pefts() -> None:
    """Per layer, views included: the reason for the file. 3 matmuls forward and 5 backward are the least there is."""
    counts = []
    for layer in layers():
        x = torch.randn(2, 4, 6, requires_grad=True)
        with Operators() as forward:
            out = layer(x)
        with Operators() as backward:
            out.sum().backward()
        counts.append((forward.count, backward.count))
    (fused_forward, fused_backward), (peft_forward, peft_backward) = counts
    assert fused_forward <= 9 < peft_forward, counts
    assert fused_backward < peft_backward, counts


def test_selective_checkpointing_changes_no_gradient(model: Model) -> None:
    """It keeps the outputs of matmuls, so the update must not be added to them where they lie."""
    from diffalign.models.adapters.lora import lora_parameters
    from diffalign.models.kernels.checkpointing import set_checkpointing
    from diffalign.models.policy.networks import Networks

    unet = model.unet()
    add_lora(unet, rank=4, seed=1)
    fuse_lora(unet)
    move_lora(unet)
    networks = Networks(unet, family=model.base.family, schedule=model.base.schedule)
    found = []
    for which in ("none", "selective", "none"):
        set_checkpointing(unet, which)
        networks.policy(model.xt, model.t, model.cond).square().mean().backward()
        found.append([p.grad for p in lora_parameters(unet)])
        unet.zero_grad(set_to_none=True)
    for gradients in found[1:]:
        for one, other in zip(found[0], gradients, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)
