"""Equal weights give equal bits, at SDXL's size and in bf16 on the GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from diffalign.models.adapters.lora import add_lora
from diffalign.models.kernels.attention import set_attention
from diffalign.models.kernels.checkpointing import set_checkpointing, store_for_autocast
from diffalign.models.loading.base import Base
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.reference import FrozenCopy, LoraOff
from tests.gpu_models import sdxl_base, sdxl_point
from tests.models.conftest import move_lora

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
RESOLUTION = 512


@pytest.fixture(scope="module")
def base() -> Base:
    return sdxl_base()


def networks(base: Base, unet, kind: str) -> Networks:
    return Networks(
        unet,
        family=base.family,
        schedule=base.schedule,
        reference=LoraOff(unet) if kind == "lora_off" else FrozenCopy(unet, BF16),
        autocast_dtype=BF16,
        device="cuda",
    )


@pytest.mark.parametrize("attention", ["auto", "flash", "efficient", "math"])
def test_lora_off_equals_the_policy_at_b_zero(base: Base, attention: str):
    unet = copy.deepcopy(base.unet)
    add_lora(unet, rank=16)
    unet.to("cuda")
    set_attention(unet, attention, "cuda")
    nets, point = networks(base, unet, "lora_off"), sdxl_point(2, RESOLUTION)
    policy, reference = nets.policy(*point), nets.reference(*point)
    assert policy.isfinite().all()
    assert torch.equal(policy, reference)


@pytest.mark.parametrize("attention", ["auto", "flash", "efficient", "math"])
def test_the_frozen_copy_equals_the_policy_at_half_the_memory(base: Base, attention: str):
    unet = copy.deepcopy(base.unet).requires_grad_(True).train()
    set_attention(unet, attention, "cuda")
    before = torch.cuda.memory_allocated()
    nets, point = networks(base, unet, "copy"), sdxl_point(2, RESOLUTION)
    held = torch.cuda.memory_allocated() - before
    policy, reference = nets.policy(*point), nets.reference(*point)
    assert policy.requires_grad
    assert torch.equal(policy, reference)
    size = sum(p.numel() * p.element_size() for p in unet.parameters())
    assert held < 0.52 * size


def test_a_frozen_base_in_bf16_changes_no_bit_of_a_lora_policy(base: Base):
    point, results = sdxl_point(2, RESOLUTION), []
    for store in (False, True):
        unet = copy.deepcopy(base.unet)
        add_lora(unet, rank=16)
        unet.to("cuda")
        move_lora(unet, by=0.01)
        if store:
            store_for_autocast(unet, BF16)
        nets = networks(base, unet, "lora_off")
        with torch.no_grad():
            results.append((nets.policy(*point), nets.reference(*point)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(*results[0])


def test_checkpointing_keeps_the_loss_and_saves_memory(base: Base):
    unet = copy.deepcopy(base.unet)
    add_lora(unet, rank=16)
    unet.to("cuda")
    set_attention(unet, "auto", "cuda")
    move_lora(unet, by=0.01)
    nets, point = networks(base, unet, "lora_off"), sdxl_point(2, RESOLUTION)
    losses, peaks = [], []
    for which in ("none", "selective", "full"):
        set_checkpointing(unet, which)
        unet.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        loss = (nets.policy(*point) - nets.reference(*point)).square().mean()
        loss.backward()
        losses.append(loss.detach())
        peaks.append(torch.cuda.max_memory_allocated() - start)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    assert peaks[2] < 0.5 * peaks[0]
    assert peaks[2] < peaks[1] < peaks[0]
