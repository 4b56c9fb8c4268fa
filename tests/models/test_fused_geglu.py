"""GEGLU in Triton against float64: on a GPU if there is one, else by Triton's interpreter on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffalign.experimental.fused_geglu import geglu, geglu_eager

pytest.importorskip("triton", reason="the kernels need triton (a Linux package; it comes with torch for CUDA)")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(2, 3, 2 * 300), (7, 2 * 8), (1, 1, 2 * 1), (1, 5, 2 * 256)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor]:
    """The projection's output, gates from -8 to 8 among them, and a slope to go back with."""
    g = torch.Generator().manual_seed(0)
    x, slope = torch.randn(shape, generator=g) * 2.5, torch.randn((*shape[:-1], shape[-1] // 2), generator=g)
    return x.to(DEVICE, dtype).requires_grad_(), slope.to(DEVICE, dtype)


def both(function, x: Tensor, slope: Tensor) -> list[Tensor]:
    out = function(x)
    return [out, *torch.autograd.grad(out, x, slope)]


def relative(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true).norm() / true.norm()).item()


def test_the_eager_form_is_the_written_sum_with_erf() -> None:
    """By Python's own erf, and not the tanh that many kernels have in its place."""
    h, g = 1.7, -0.6
    x = torch.tensor([h, g], dtype=torch.float64, requires_grad=True)
    out, grad = both(geglu_eager, x, torch.ones(1, dtype=torch.float64))
    below = (1 + math.erf(g / math.sqrt(2))) / 2
    density = math.exp(-g * g / 2) / math.sqrt(2 * math.pi)
    assert out.item() == pytest.approx(h * g * below, rel=1e-12)
    assert grad.tolist() == pytest.approx([g * below, h * (below + g * density)], rel=1e-12)
    by_tanh = h * torch.nn.functional.gelu(torch.tensor(g, dtype=torch.float64), approximate="tanh").item()
    assert abs(by_tanh - out.item()) > 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_answer_and_gradient(shape: tuple[int, ...]) -> None:
    x, slope = inputs(shape)
    found, true = both(geglu, x, slope), both(geglu_eager, x.detach().double().requires_grad_(), slope.double())
    assert found[0].grad_fn.name() == "_GegluBackward"
    for one, other in zip(found, true, strict=True):
        assert one.shape == other.shape
        assert relative(one, other) < 1e-6
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    x, slope = inputs(SHAPES[0], dtype)
    found = both(geglu, x, slope)
    wide = both(geglu, x.detach().float().requires_grad_(), slope.float())
    for one, other in zip(found, wide, strict=True):
        assert one.dtype == dtype
        if dtype == FP16 or DEVICE == "cuda":
            assert torch.equal(one, other.to(dtype))
        else:  # the interpreter cuts bfloat16 off
            torch.testing.assert_close(one.float(), other, rtol=torch.finfo(dtype).eps, atol=1e-30)


def test_what_is_not_finite_is_as_in_torch() -> None:
    bad = [float("inf"), float("-inf"), float("nan"), 0.0, 1e4, -1e4]
    x = torch.tensor([[a, b] for a in bad for b in bad], device=DEVICE, requires_grad=True)
    slope = torch.ones(len(x), 1, device=DEVICE)
    found, theirs = both(geglu, x, slope), both(geglu_eager, x, slope)
    for one, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0.0, equal_nan=True)


def test_the_projections_output_alone_is_kept() -> None:
    x, _ = inputs(SHAPES[0])
    kept: list[list[int]] = []
    for function in (geglu, geglu_eager):
        sizes: dict[int, int] = {}

        def keep(v: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[v.untyped_storage()._cdata] = v.untyped_storage().nbytes()
            return v

        projected = x * 1.0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
            function(projected)
        assert projected.untyped_storage()._cdata in sizes
        kept.append(sorted(sizes.values()))
    whole = 4 * x.numel()
    assert kept == [[whole], [whole // 2, whole]]  # torch keeps gelu(g) as well


def test_rows_that_are_not_neighbours_and_float64() -> None:
    x, slope = inputs((4, 6, 2 * 16))
    apart = x.detach().transpose(0, 1).requires_grad_()
    found = both(geglu, apart, slope.transpose(0, 1))
    for one, other in zip(found, both(geglu, x, slope), strict=True):
        assert torch.equal(one, other.transpose(0, 1))
    assert geglu(x.double()).grad_fn.name() != "_GegluBackward"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("shape", [(2, 4096, 2 * 2560), (4, 1024, 2 * 5120)])
def test_at_sdxls_shapes_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, slope = inputs(shape, dtype)
    found, true = both(geglu, x, slope), both(geglu_eager, x.detach().double().requires_grad_(), slope.double())
    for one, other in zip(found, true, strict=True):
        assert relative(one, other) < max(torch.finfo(dtype).eps / 2, 1e-6)
