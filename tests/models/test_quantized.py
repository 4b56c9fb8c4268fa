"""Linear layers in 8 and 4 bits: codes by hand and by the definition of NormalFloat, products, gradients, a LoRA."""

from __future__ import annotations

from statistics import NormalDist
from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional

from diffalign.models.adapters.core_methods import LoRA
from diffalign.models.adapters.methods import Start
from diffalign.models.kernels.quantized import NF4, QuantizedLinear, from_codes, quantize, to_codes
from diffalign.models.loading.family import ModelError
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.reference import LoraOff
from tests.models.conftest import Model, move_lora

Kind = Literal["int8", "nf4"]
KINDS: tuple[Kind, ...] = ("int8", "nf4")


def weights(rows: int = 24, columns: int = 32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_the_sixteen_values_are_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, appendix E: eight for the positive half and nine for the negative one, which share zero."""
    quantile, offset = NormalDist().inv_cdf, 0.9677083
    positive = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    expected = sorted([*negative, 0.0, *positive])
    largest = max(expected)
    assert pytest.approx([value / largest for value in expected], abs=1e-6) == NF4


def test_int8_by_hand() -> None:
    codes, scale = to_codes(torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]]), "int8")
    assert codes.tolist() == [[127, -50, 0], [0, 0, 0]]
    assert scale.flatten().tolist() == pytest.approx([0.01, 0.0])
    assert from_codes(codes, scale, 3, torch.float32).flatten().tolist() == pytest.approx([1.27, -0.5, 0, 0, 0, 0])


def test_nf4_is_the_nearest_of_the_sixteen_in_each_block() -> None:
    weight = weights()
    codes, scale = to_codes(weight, "nf4")
    assert (codes.dtype, codes.shape, scale.shape) == (torch.uint8, (24 * 32 // 2,), (12,))
    table = torch.tensor(NF4)
    blocks = weight.view(12, 64)
    largest = blocks.abs().max(1, keepdim=True).values
    nearest = table[(blocks[..., None] / largest[..., None] - table).abs().argmin(2)] * largest
    assert torch.equal(from_codes(codes, scale, 32, torch.float32), nearest.view(24, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_stable_and_near(kind: Kind) -> None:
    """Restored weights have the same codes again; the error is at most half a step."""
    weight = weights()
    codes, scale = to_codes(weight, kind)
    restored = from_codes(codes, scale, 32, torch.float32)
    again, scales = to_codes(restored, kind)
    assert torch.equal(again, codes)
    torch.testing.assert_close(scales, scale, rtol=1e-6, atol=0)
    step = scale / 2 if kind == "int8" else (scale * 0.5 * (1 - 0.6961928)).repeat_interleave(64).view(24, 32)
    assert bool(((restored - weight).abs() <= step * 1.001).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_the_restored_weight(kind: Kind, bias: bool) -> None:
    linear = nn.Linear(32, 24, bias=bias).double().requires_grad_(False)
    layer = QuantizedLinear(linear, kind)
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = layer(x)
    expected = functional.linear(x, layer.weight.double(), layer.bias)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(layer, (x,))
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x.float())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_lora_starts_at_its_reference_and_moves(model: Model, kind: Kind, dtype: torch.dtype | None) -> None:
    unet = model.unet()
    whole = sum(p.numel() * p.element_size() for p in unet.parameters())
    LoRA(rank=4, quantize_base=kind).prepare(unet, Start())
    linears = [m for m in unet.modules() if isinstance(m, QuantizedLinear)]
    assert linears
    assert not any(isinstance(m, nn.Linear) and "attentions" in n and "lora" not in n for n, m in unet.named_modules())
    stored = sum(b.numel() * b.element_size() for b in unet.buffers())
    lora = sum(p.numel() * p.element_size() for p in unet.parameters() if p.requires_grad)
    base = sum(p.numel() * p.element_size() for p in unet.parameters()) - lora + stored
    saved = sum(m.in_features * m.out_features for m in linears) * (4 - {"int8": 1, "nf4": 0.5}[kind])
    assert whole - base == pytest.approx(saved, rel=0.15)  # less the scales
    networks = Networks(
        unet, family=model.base.family, schedule=model.base.schedule, reference=LoraOff(unet), autocast_dtype=dtype
    )
    before = networks.policy(model.xt, model.t, model.cond)
    assert torch.equal(before, networks.reference(model.xt, model.t, model.cond))
    move_lora(unet)
    after = networks.policy(model.xt, model.t, model.cond)
    assert not torch.equal(after, networks.reference(model.xt, model.t, model.cond))
    after.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in unet.parameters() if p.requires_grad)


def test_layers_that_are_trained_or_outside_of_the_blocks_keep_their_weights(model: Model) -> None:
    unet = model.unet()
    unet.requires_grad_(True)
    assert quantize(unet, "int8") == 0
    with pytest.raises(ModelError, match="a DoRA reads the lengths of the base's rows"):
        LoRA(use_dora=True, quantize_base="nf4").check()
