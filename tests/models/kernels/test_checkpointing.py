from __future__ import annotations

import pytest
import torch

from diffalign.models.adapters.lora import add_lora
from diffalign.models.kernels.checkpointing import ALIGNMENT, place, set_checkpointing, store_for_autocast
from diffalign.models.loading.base import load_base
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.reference import FrozenCopy, LoraOff
from diffalign.training.inspect.activation_memory import SavedForBackward
from tests.models.conftest import Model, move_lora


def step(model: Model, unet, kind: str, dtype) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Loss, gradients and bytes kept for the backward pass of one step against the reference."""
    networks = Networks(
        unet,
        family=model.base.family,
        schedule=model.base.schedule,
        reference=LoraOff(unet) if kind == "lora_off" else FrozenCopy(model.unet(), dtype),
        autocast_dtype=dtype,
    )
    unet.zero_grad()
    with SavedForBackward() as kept:
        policy = networks.policy(model.xt, model.t, model.cond)
    loss = (policy - networks.reference(model.xt, model.t, model.cond) - 1).square().mean()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in unet.parameters() if p.requires_grad], kept.bytes


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora_off", "copy"])
def test_checkpointing_changes_memory_and_nothing_else(model: Model, kind: str, dtype):
    unet = model.unet().train()
    if kind == "lora_off":
        add_lora(unet, rank=4)
        move_lora(unet)
    else:
        unet.requires_grad_(True)
    plain = step(model, unet, kind, dtype)
    set_checkpointing(unet, "full")
    full = step(model, unet, kind, dtype)
    set_checkpointing(unet, "selective")
    selective = step(model, unet, kind, dtype)
    set_checkpointing(unet, "none")
    again = step(model, unet, kind, dtype)
    for other in (full, selective, again):
        torch.testing.assert_close(other[0], plain[0], rtol=1e-5, atol=0)  # LoRA adds in place or not
        for a, b in zip(other[1], plain[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert again[2] == plain[2]
    assert full[2] < selective[2] < plain[2]
    assert full[2] < 0.6 * plain[2]
    if kind == "copy":  # a frozen layer's input is not kept anyway, so LoRA has less to save
        assert selective[2] < 0.85 * plain[2]


def test_only_frozen_matmul_and_conv_weights_change_their_dtype(model: Model):
    unet = model.unet()
    unet.conv_in.requires_grad_(True)
    store_for_autocast(unet, torch.bfloat16)
    assert unet.conv_in.weight.dtype == torch.float32
    assert unet.conv_out.weight.dtype == unet.conv_out.bias.dtype == torch.bfloat16
    assert unet.time_embedding.linear_1.weight.dtype == torch.bfloat16
    assert unet.conv_norm_out.weight.dtype == torch.float32


def askew(tensors) -> int:
    return sum(x.data_ptr() % ALIGNMENT != 0 for x in tensors)


def test_weights_from_files_lie_as_copies_of_them_do(model: Model):
    """Kernels may round by address, and policy and reference are to agree to the bit."""
    unet = load_base(str(model.folder), vae_and_text=False).unet
    assert askew(unet.parameters()) > 0  # mapped from the file
    expected = {name: x.clone() for name, x in unet.state_dict().items()}
    assert place(unet, torch.device("cpu")) is unet
    assert askew(unet.parameters()) == 0
    assert all(torch.equal(x, expected[name]) for name, x in unet.state_dict().items())
