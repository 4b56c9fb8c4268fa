"""GroupNorm with SiLU in Triton against float64: on a GPU if there is one, else by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffalign.experimental.fused_norm import NHWC, group_norm_silu, group_norm_silu_eager

pytest.importorskip("triton", reason="the kernels need triton (a Linux package; it comes with torch for CUDA)")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Channels of SDXL's norms with 32 groups: 10 to 80 in a group. Few places, for the interpreter, none a multiple.
SHAPES = [
    (2, 320, 5, 7, 32),
    (1, 640, 3, 3, 32),
    (1, 960, 1, 2, 32),
    (1, 1280, 3, 1, 32),
    (1, 1920, 2, 2, 32),
    (1, 2560, 1, 3, 32),
    (2, 96, 9, 11, 8),  # three tiles of places, 96 = 64 + 32 channels
    (3, 24, 1, 1, 8),  # one place: places is the constant 1 to Triton
    (1, 8, 33, 33, 8),  # one channel a group; more than 32² places: larger tiles
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = FP32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, γ, β and a slope to go back with; x has another mean and size in every channel."""
    n, c, h, w, _ = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g)

    x = normal(n, c, h, w) * (0.5 + normal(1, c, 1, 1).abs()) + normal(1, c, 1, 1)
    x, slope = (v.to(DEVICE, dtype).contiguous(memory_format=NHWC) for v in (x, normal(n, c, h, w)))
    return x.requires_grad_(), *(v.to(DEVICE).requires_grad_() for v in (normal(c), normal(c))), slope


def both(function, x, weight, bias, slope, groups, **how) -> list[Tensor]:
    """The answer, and the gradients of x, γ and β."""
    out = function(x, groups, weight, bias, 1e-5, **how)
    return [out, *torch.autograd.grad(out, (x, weight, bias), slope.to(out.dtype))]


def exact(x, weight, bias, slope, groups, **how) -> list[Tensor]:
    doubles = [v.detach().double().requires_grad_() for v in (x, weight, bias)]
    return both(group_norm_silu_eager, *doubles, slope.double(), groups, **how)


def relative(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true).norm() / true.norm()).item()


def test_the_eager_form_is_the_written_sum() -> None:
    """In float64: z σ(z) of the normalised group, and its slope by hand."""
    x, weight, bias, slope = (v.detach().double() for v in inputs((2, 12, 3, 2, 4)))
    z = x.reshape(2, 4, 3, 6)
    centre, var = z.mean((2, 3), keepdim=True), z.var((2, 3), correction=0, keepdim=True)
    z = ((z - centre) / (var + 1e-5).sqrt()).reshape(2, 12, 3, 2)
    y = z * weight[:, None, None] + bias[:, None, None]
    s = 1 / (1 + (-y).exp())
    dy = slope * s * (1 + y * (1 - s))
    grad_z = (dy * weight[:, None, None]).reshape(2, 4, 3, 6)
    flat = z.reshape(2, 4, 3, 6)
    plain, along = (v.mean((2, 3), keepdim=True) for v in (grad_z, grad_z * flat))
    grad_x = ((grad_z - plain - flat * along) / (var + 1e-5).sqrt()).reshape(2, 12, 3, 2)
    given = [v.requires_grad_() for v in (x, weight, bias)]
    found = both(group_norm_silu_eager, *given, slope, 4)
    for one, true in zip(found, (y * s, grad_x, (dy * z).sum((0, 2, 3)), dy.sum((0, 2, 3))), strict=True):
        torch.testing.assert_close(one, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_answer_and_gradients(shape: tuple[int, ...]) -> None:
    x, weight, bias, slope = inputs(shape)
    found = both(group_norm_silu, x, weight, bias, slope, shape[-1])
    assert found[0].grad_fn.name() == "_GroupNormSiLUBackward"
    assert all(v.is_contiguous(memory_format=NHWC) for v in found[:2])
    for one, true in zip(found, exact(x, weight, bias, slope, shape[-1]), strict=True):
        if true.norm() > 1e-6:  # a group of one value has z = 0 and no slope
            assert relative(one, true) < 1e-6
        torch.testing.assert_close(one.double(), true, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_half_precision_differs_by_its_rounding(dtype: torch.dtype) -> None:
    """And parameters' slopes, which stay float32, by nothing else."""
    x, weight, bias, slope = inputs(SHAPES[0], dtype)
    found = both(group_norm_silu, x, weight, bias, slope, 32)
    assert [v.dtype for v in found] == [dtype, dtype, FP32, FP32]
    ulp = torch.finfo(dtype).eps  # a rounding moves a value by half of it; the interpreter cuts bfloat16 off: all of it
    for one, true in zip(found, exact(x, weight, bias, slope, 32), strict=True):
        assert relative(one, true) < (ulp if one.dtype == dtype else 1e-6)


def test_it_rounds_once_and_as_the_next_layers_cast_would() -> None:
    """float32 sums whatever the output is: the half-precision answer is the float32 one, cast."""
    x, weight, bias, _ = inputs(SHAPES[0], FP32)
    plain = group_norm_silu(x, 32, weight, bias)
    for dtype in (FP16, BF16):
        with torch.autocast(DEVICE, dtype=dtype):
            cast = group_norm_silu(x, 32, weight, bias)
            eager = group_norm_silu_eager(x, 32, weight, bias)
        assert cast.dtype == eager.dtype == dtype
        if dtype == FP16 or DEVICE == "cuda":
            assert torch.equal(cast, plain.to(dtype))
        else:  # the interpreter cuts bfloat16 off
            torch.testing.assert_close(cast.float(), plain, rtol=torch.finfo(BF16).eps, atol=1e-30)


def test_without_the_silu() -> None:
    x, weight, bias, slope = inputs((1, 64, 3, 5, 8))
    found = both(group_norm_silu, x, weight, bias, slope, 8, silu=False)
    for one, true in zip(found, exact(x, weight, bias, slope, 8, silu=False), strict=True):
        assert relative(one, true) < 1e-6


def test_a_large_mean_cancels_nothing() -> None:
    """Σx² - (Σx)² would lose all its digits here: the variance is 1e-6 of the squared mean."""
    x, weight, bias, slope = inputs((1, 64, 9, 11, 8))
    x = (torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE) + 1000).detach()
    x = x.contiguous(memory_format=NHWC).requires_grad_()
    found, true = both(group_norm_silu, x, weight, bias, slope, 8), exact(x, weight, bias, slope, 8)
    assert relative(found[0], true[0]) < 1e-4  # x itself has 6e-5 of a standard deviation for its last digit
    assert relative(found[1], true[1]) < 1e-4


def test_a_batch_is_its_images_and_twice_is_the_same() -> None:
    x, weight, bias, slope = inputs(SHAPES[6])
    whole, again = (both(group_norm_silu, x, weight, bias, slope, 8) for _ in range(2))
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one, other)
    parts = [both(group_norm_silu, x[i : i + 1], weight, bias, slope[i : i + 1], 8) for i in range(len(x))]
    for k in (0, 1):
        assert torch.equal(whole[k], torch.cat([part[k] for part in parts]))
    for k in (2, 3):
        assert torch.equal(whole[k], torch.stack([part[k] for part in parts]).sum(0))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_spoils_what_it_spoils_in_torch(bad: float) -> None:
    x, weight, bias, slope = inputs((2, 32, 5, 7, 4))
    with torch.no_grad():
        x[1, 9, 2, 3] = bad
    found = both(group_norm_silu, x, weight, bias, slope, 4)
    theirs = both(group_norm_silu_eager, x, weight, bias, slope, 4)
    for one, other in zip(found, theirs, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.isinf(), other.isinf())
    assert found[0].isnan().sum() == 8 * 35  # its group, and no more


def test_far_out_silu_is_flat_and_finite() -> None:
    x, weight, bias, slope = inputs((1, 32, 5, 7, 4))
    bias = torch.where(torch.arange(32, device=DEVICE) % 2 == 0, 200.0, -200.0).requires_grad_()
    found, true = both(group_norm_silu, x, weight, bias, slope, 4), exact(x, weight, bias, slope, 4)
    for one, other in zip(found, true, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_a_slope_laid_out_otherwise_is_the_same_slope() -> None:
    x, weight, bias, slope = inputs((2, 32, 5, 7, 4))
    plain = both(group_norm_silu, x, weight, bias, slope, 4)
    for one, other in zip(plain, both(group_norm_silu, x, weight, bias, slope.contiguous(), 4), strict=True):
        assert torch.equal(one, other)


def test_exactly_x_and_the_statistics_are_kept() -> None:
    """Torch keeps x in float32, the norm's float32 answer and the SiLU's, under autocast; 2 bytes a value do."""
    x, weight, bias, _ = inputs(SHAPES[6], FP16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        group_norm_silu(x, 8, weight, bias)
    own = {v.untyped_storage()._cdata for v in (weight, bias)}
    sizes = [v.numel() * v.element_size() for v in kept if v.untyped_storage()._cdata not in own]
    assert sorted(sizes) == [2 * 8 * 4, 2 * 8 * 4, 2 * x.numel()]
    assert any(v.untyped_storage()._cdata == x.untyped_storage()._cdata for v in kept)


@pytest.mark.parametrize("given", ["NCHW", "float64"])
def test_what_the_kernels_do_not_take_is_torchs_own(given: str) -> None:
    x, weight, bias, _ = inputs((2, 32, 5, 7, 4))
    if given == "NCHW":
        x = x.detach().contiguous().requires_grad_()
    else:
        x, weight, bias = x.double(), weight.double(), bias.double()
    out = group_norm_silu(x, 4, weight, bias)
    assert out.grad_fn.name() != "_GroupNormSiLUBackward"
    assert torch.equal(out, group_norm_silu_eager(x, 4, weight, bias))


def test_without_cuda_and_interpreter_it_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight, bias, _ = (v.cpu() for v in inputs((2, 32, 5, 7, 4)))
    assert torch.equal(group_norm_silu(x, 4, weight, bias), group_norm_silu_eager(x, 4, weight, bias))


def test_slopes_nobody_asks_for_are_not_made() -> None:
    x, weight, bias, slope = inputs((2, 32, 5, 7, 4))
    frozen = group_norm_silu(x, 4, weight.detach(), bias.detach())
    (grad,) = torch.autograd.grad(frozen, x, slope)
    assert torch.equal(grad, both(group_norm_silu, x, weight, bias, slope, 4)[1])
    with torch.no_grad():
        assert torch.equal(group_norm_silu(x, 4, weight, bias), frozen)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 320, 128, 128, 32),
        (1, 960, 128, 128, 32),
        (2, 640, 64, 64, 32),
        (2, 2560, 32, 32, 32),
        (2, 1280, 31, 45, 32),
    ],
)
def test_at_sdxls_shapes_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias, slope = inputs(shape, dtype)
    found = both(group_norm_silu, x, weight, bias, slope, 32)
    assert found[0].grad_fn.name() == "_GroupNormSiLUBackward"
    ulp = torch.finfo(dtype).eps
    for one, true in zip(found, exact(x, weight, bias, slope, 32), strict=True):
        assert relative(one, true) < (max(ulp / 2, 2e-6) if one.dtype == dtype else 2e-6)
    for one, other in zip(found, both(group_norm_silu, x, weight, bias, slope, 32), strict=True):
        assert torch.equal(one, other)
