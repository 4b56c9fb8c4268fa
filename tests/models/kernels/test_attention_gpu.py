"""On a GPU: the profiler sees the attention kernel that was requested, and all kernels agree."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from diffalign.models.adapters.lora import add_lora, lora_parameters
from diffalign.models.kernels.attention import set_attention
from diffalign.models.loading.base import Base
from diffalign.models.loading.family import ModelError
from diffalign.models.policy.networks import Networks
from tests.gpu_models import sdxl_base, sdxl_point
from tests.models.conftest import move_lora

pytestmark = pytest.mark.gpu
RESOLUTION = 512
# What an operator or kernel name of each backend contains; nobody else's does.
MARKS = {
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "flash": "_scaled_dot_product_flash_attention",
    "efficient": "_scaled_dot_product_efficient_attention",
    "math": "_scaled_dot_product_attention_math",
    "xformers": "xformers",
}
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)
AUTO = "cudnn" if HOPPER else "flash"


@pytest.fixture(scope="module")
def base() -> Base:
    base = sdxl_base()
    add_lora(base.unet, rank=16)
    base.unet.to("cuda")
    move_lora(base.unet, by=0.01)
    return base


def step(base: Base, backend: str) -> tuple[set[str], torch.Tensor, torch.Tensor]:
    """Names of all operators and kernels of a forward and backward pass, the prediction, and a gradient."""
    set_attention(base.unet, backend, "cuda")
    networks = Networks(
        base.unet, family=base.family, schedule=base.schedule, autocast_dtype=torch.bfloat16, device="cuda"
    )
    base.unet.zero_grad()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        out = networks.policy(*sdxl_point(2, RESOLUTION))
        out.square().mean().backward()
        torch.cuda.synchronize()
    return {event.key for event in prof.key_averages()}, out.detach(), lora_parameters(base.unet)[-1].grad.clone()


def backends() -> list[str]:
    """Those this machine should be able to run."""
    has_xformers = importlib.util.find_spec("xformers") is not None
    return ["flash", "efficient", "math", *(["cudnn"] if HOPPER else []), *(["xformers"] if has_xformers else [])]


@pytest.mark.parametrize("backend", ["auto", *MARKS])
def test_the_profiler_sees_the_kernel_that_was_asked_for(base: Base, backend: str):
    if backend != "auto" and backend not in backends():
        pytest.skip(f"{backend} is not available here")
    names, out, _ = step(base, backend)
    wanted = MARKS[AUTO if backend == "auto" else backend]
    assert out.isfinite().all()
    assert any(wanted in name.lower() for name in names), sorted(n for n in names if "attention" in n.lower())
    others = [mark for mark in MARKS.values() if mark != wanted]
    # auto may fall back for a layer its favourite refuses; a named backend may not
    if backend != "auto":
        assert not [name for name in names for mark in others if mark in name.lower()]


@pytest.mark.parametrize("backend", ["auto", "flash", "efficient", "cudnn", "xformers"])
def test_all_kernels_agree_in_bf16(base: Base, backend: str):
    if backend != "auto" and backend not in backends():
        pytest.skip(f"{backend} is not available here")
    _, exact, exact_grad = step(base, "math")
    _, out, grad = step(base, backend)
    # bf16 has 8 bits: 70 layers of roundings add up to percents of the output's spread, not more
    assert (out - exact).std() < 0.03 * exact.std()
    assert (grad - exact_grad).norm() < 0.1 * exact_grad.norm()


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_half_precision_kernels_refuse_float32(base: Base, backend: str):
    set_attention(base.unet, backend, "cuda")
    networks = Networks(base.unet, family=base.family, schedule=base.schedule, device="cuda")
    with pytest.raises(ModelError, match="mixed_precision"):
        networks.policy(*sdxl_point(1, 256))
