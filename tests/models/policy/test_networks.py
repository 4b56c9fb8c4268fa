from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from diffalign.models.adapters.lora import add_lora, lora_layers, lora_parameters
from diffalign.models.kernels.checkpointing import store_for_autocast
from diffalign.models.loading.family import ModelError
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.reference import FrozenCopy, LoraOff
from diffalign.types import Conditioning
from tests.models.conftest import Model, move_lora

DTYPES = [None, torch.bfloat16, torch.float16]


def networks(model: Model, unet, kind: str = "none", dtype=None, module=None) -> Networks:
    made = {"none": lambda: None, "lora_off": lambda: LoraOff(unet), "copy": lambda: FrozenCopy(unet, dtype)}
    return Networks(
        module or unet,
        family=model.base.family,
        schedule=model.base.schedule,
        reference=made[kind](),
        autocast_dtype=dtype,
    )


def both(model: Model, nets: Networks) -> tuple[torch.Tensor, torch.Tensor]:
    return nets.policy(model.xt, model.t, model.cond), nets.reference(model.xt, model.t, model.cond)


def as_lora(unet):
    add_lora(unet, rank=4, alpha=10)
    return unet


def as_full(unet):
    return unet.requires_grad_(True).train()


@pytest.fixture
def process_group(tmp_path: Path):
    init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    destroy_process_group()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "tune"), [("lora_off", as_lora), ("copy", as_full)])
def test_equal_weights_give_equal_bits(model: Model, kind: str, tune, dtype):
    policy, reference = both(model, networks(model, tune(model.unet()), kind, dtype))
    assert torch.equal(policy, reference)
    assert policy.dtype == reference.dtype == torch.float32
    assert policy.requires_grad
    assert not reference.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "tune"), [("lora_off", as_lora), ("copy", as_full)])
def test_the_reference_stays_when_the_policy_moves(model: Model, kind: str, tune, dtype):
    unet = tune(model.unet())
    nets = networks(model, unet, kind, dtype)
    _, before = both(model, nets)
    with torch.no_grad():
        for p in unet.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.01)
    policy, reference = both(model, nets)
    assert torch.equal(reference, before)
    assert not torch.equal(policy, reference)


def test_the_prediction_is_the_unets_own(model: Model):
    """Against diffusers' calling convention, with the conditioning written out by hand."""
    nets = networks(model, model.unet())
    extra = {}
    if model.base.family.name == "sdxl":
        extra = {"added_cond_kwargs": {"text_embeds": model.cond.pooled, "time_ids": model.cond.time_ids}}
    with torch.no_grad():
        theirs = model.base.unet(model.xt, model.t, encoder_hidden_states=model.cond.prompt_embeds, **extra).sample
    assert torch.equal(nets.policy(model.xt, model.t, model.cond), theirs)


def test_every_sample_is_answered_by_itself(model: Model):
    nets = networks(model, model.unet())
    whole = nets.policy(model.xt, model.t, model.cond)
    for i in range(2):
        one = Conditioning(
            *(
                None if x is None else x[i : i + 1]
                for x in (model.cond.prompt_embeds, model.cond.pooled, model.cond.time_ids)
            )
        )
        part = nets.policy(model.xt[i : i + 1], model.t[i : i + 1], one)
        torch.testing.assert_close(part, whole[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module_dtype", [None, torch.bfloat16])
def test_casts_happen_at_the_border(models, module_dtype):
    """bf16 weights or bf16 autocast: latents and embeddings are cast, t and the time ids are not."""
    model, seen = models["sdxl"], {}
    unet = model.unet().to(module_dtype or torch.float32)
    nets = networks(model, unet, dtype=None if module_dtype else torch.bfloat16)

    def spy(module, args, kwargs):
        seen["xt"], seen["t"] = args
        seen.update({"prompt_embeds": kwargs["encoder_hidden_states"], **kwargs["added_cond_kwargs"]})

    unet.register_forward_pre_hook(spy, with_kwargs=True)
    out = nets.policy(model.xt, model.t, model.cond)
    assert {name: x.dtype for name, x in seen.items()} == {
        "xt": torch.bfloat16,
        "t": torch.int64,
        "prompt_embeds": torch.bfloat16,
        "text_embeds": torch.bfloat16,
        "time_ids": torch.float32,
    }
    assert torch.equal(seen["time_ids"], model.cond.time_ids)
    assert out.dtype == torch.float32


def test_one_reference_forward_a_step_and_no_second_unet(model: Model):
    unet = as_lora(model.unet())
    calls = []
    unet.register_forward_pre_hook(lambda module, args: calls.append(lora_layers(unet)[0].disable_adapters))
    nets = networks(model, unet, "lora_off")
    both(model, nets)
    assert calls == [False, True]
    assert nets.reference_forwards == 1
    reference = nets._reference
    assert isinstance(reference, LoraOff)
    with reference.active() as module:
        assert module is unet


def test_an_error_in_the_reference_leaves_lora_on(model: Model):
    unet = as_lora(model.unet())
    move_lora(unet)
    nets = networks(model, unet, "lora_off")
    before = nets.policy(model.xt, model.t, model.cond)
    with pytest.raises(RuntimeError):
        nets.reference(model.xt[:, :3], model.t, model.cond)
    assert torch.equal(nets.policy(model.xt, model.t, model.cond), before)
    assert all(p.requires_grad for p in lora_parameters(unet))


@pytest.mark.parametrize(("kind", "tune"), [("lora_off", as_lora), ("copy", as_full)])
def test_gradients_through_ddp_are_those_without(model: Model, process_group, kind: str, tune):
    def gradients(wrap: bool) -> list[torch.Tensor]:
        unet = tune(model.unet())
        if kind == "lora_off":
            move_lora(unet)
        module = DistributedDataParallel(unet) if wrap else unet
        nets = networks(model, unet, kind, module=module)
        for _ in range(2):  # the second step finds out whether the reference disturbed DDP's buckets
            policy, reference = both(model, nets)
            (policy - reference - 1).square().mean().backward()
        return [p.grad for p in unet.parameters() if p.requires_grad]

    for plain, wrapped in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, wrapped, rtol=1e-5, atol=1e-7)


def test_the_frozen_copy_is_half_the_size_and_takes_no_part(model: Model):
    unet = as_full(model.unet())
    unet.get_parameter("conv_in.weight").grad = torch.ones_like(unet.get_parameter("conv_in.weight"))
    nets = networks(model, unet, "copy", torch.bfloat16)
    copy = nets._reference.module
    sizes = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in (copy, unet)]
    assert sizes[0] < 0.51 * sizes[1]
    assert not copy.training
    policy, reference = both(model, nets)
    (policy - reference - 1).square().mean().backward()
    assert not reference.requires_grad
    assert all(p.grad is None for p in copy.parameters())
    # the flags are the policy's all the same: matmul picks its kernel by them, and with it the last bits
    assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in unet.parameters()]
    assert {p.dtype for p in unet.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_frozen_base_in_the_autocast_dtype_changes_no_bit_of_a_lora_policy(model: Model, dtype):
    outputs, gradients = [], []
    for store in (False, True):
        unet = as_lora(model.unet())
        move_lora(unet)
        if store:
            store_for_autocast(unet, dtype)
        assert {p.dtype for p in lora_parameters(unet)} == {torch.float32}
        policy, reference = both(model, networks(model, unet, "lora_off", dtype))
        (policy - reference).square().mean().backward()
        outputs.append((policy, reference))
        gradients.append([p.grad for p in lora_parameters(unet)])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_cannot_be_compared_is_refused(model: Model):
    nets = networks(model, model.unet())
    with pytest.raises(ModelError, match="no reference"):
        nets.reference(model.xt, model.t, model.cond)
    with pytest.raises(ModelError, match="no LoRA layers"):
        LoraOff(model.unet())


def test_a_learned_variance_is_refused(model: Model):
    unet = model.unet()
    unet.register_to_config(out_channels=8)
    with pytest.raises(ModelError, match="learned sigma"):
        networks(model, unet)


def test_an_sdxl_network_needs_its_conditioning(models):
    model = models["sdxl"]
    with pytest.raises(ValueError, match=r"Conditioning.pooled and .time_ids"):
        networks(model, model.unet()).policy(model.xt, model.t, Conditioning(model.cond.prompt_embeds))
