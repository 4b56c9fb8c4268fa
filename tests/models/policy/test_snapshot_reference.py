"""A snapshot of the policy as reference: it predicts as the snapshot did, and the policy is not changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.models.adapters.lora import add_lora
from diffalign.models.loading.family import ModelError
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.snapshot_reference import DELTA_FILE, FormerCopy, FormerLora, make_former
from tests.models.conftest import Model

METHODS = ["lora", "full"]


def tuned(model: Model, method: str):
    unet = model.unet()
    if method == "lora":
        add_lora(unet, rank=4, alpha=10)
    else:
        unet.requires_grad_(True)
    return unet


def move(unet, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in unet.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.02)


def build(model: Model, method: str, dtype=None):
    unet = tuned(model, method)
    former = make_former(unet, model.base.family, dtype)
    nets = Networks(
        unet, family=model.base.family, schedule=model.base.schedule, reference=former, autocast_dtype=dtype
    )
    return unet, former, nets


def answers(model: Model, nets: Networks) -> tuple[torch.Tensor, torch.Tensor]:
    args = (model.xt, model.t, model.cond)
    return nets.policy(*args).detach(), nets.reference(*args)


@pytest.mark.parametrize("method", METHODS)
def test_it_answers_as_the_policy_that_was_saved(model: Model, method: str, tmp_path: Path) -> None:
    unet, former, nets = build(model, method)
    assert isinstance(former, FormerLora if method == "lora" else FormerCopy)
    start, reference = answers(model, nets)
    assert torch.equal(reference, start)
    then = []
    for k in range(2):
        move(unet, k)
        then.append(answers(model, nets)[0])
        former.save(tmp_path / f"policy-{k}")
        assert torch.equal(answers(model, nets)[1], start)  # saving changes nothing
    move(unet, 9)
    now = answers(model, nets)[0]
    for entry, wanted in ((1, then[1]), (0, then[0]), (None, start), (1, then[1])):
        former.load(None if entry is None else tmp_path / f"policy-{entry}")
        policy, reference = answers(model, nets)
        assert torch.equal(policy, now)
        if method == "lora" or entry is None:
            assert torch.equal(reference, wanted)
        else:  # deltas are bfloat16: 2^-8 of the change, not of the weights
            close, far = (reference - wanted).abs().max(), (start - wanted).abs().max()
            assert float(close) < 0.02 * float(far)


@pytest.mark.parametrize("method", METHODS)
def test_under_autocast_the_start_is_the_policy_to_the_bit(model: Model, method: str) -> None:
    _, former, nets = build(model, method, torch.bfloat16)
    policy, reference = answers(model, nets)
    assert torch.equal(policy, reference)
    former.load(None)
    assert torch.equal(answers(model, nets)[1], policy)


def test_gradients_and_an_error_inside_leave_the_policy_alone(model: Model) -> None:
    unet, former, nets = build(model, "lora")
    move(unet, 0)
    reference = nets.reference(model.xt, model.t, model.cond)
    before = {name: p.data_ptr() for name, p in unet.named_parameters()}
    (nets.policy(model.xt, model.t, model.cond) - reference).square().mean().backward()
    grads = [p.grad for p in unet.parameters() if p.requires_grad]
    assert all(g is not None for g in grads)
    with pytest.raises(RuntimeError, match="inside"), former.active():
        raise RuntimeError("inside")
    assert {name: p.data_ptr() for name, p in unet.named_parameters()} == before


def test_a_saved_adapter_is_a_lora_file(model: Model, tmp_path: Path) -> None:
    from diffalign.models.adapters.save_load import load_tuned

    unet, former, nets = build(model, "lora")
    move(unet, 3)
    former.save(tmp_path / "policy")
    fresh = model.unet()
    assert load_tuned(fresh, tmp_path / "policy").kind == "lora"
    other = Networks(fresh, family=model.base.family, schedule=model.base.schedule)
    torch.testing.assert_close(other.policy(model.xt, model.t, model.cond), answers(model, nets)[0])


def test_deltas_take_half_the_bytes(model: Model, tmp_path: Path) -> None:
    unet, former, _ = build(model, "full")
    former.save(tmp_path / "policy")
    delta = load_file(tmp_path / "policy" / DELTA_FILE)
    assert {x.dtype for x in delta.values()} == {torch.bfloat16}
    assert delta.keys() == dict(unet.named_parameters()).keys()


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_policy_is_named(model: Model, method: str, tmp_path: Path) -> None:
    _, former, _ = build(model, method)
    with pytest.raises(ModelError, match=r"snapshot .*policy-00004.* is missing"):
        former.load(tmp_path / "policy-00004")


@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_policy_is_named(model: Model, method: str, tmp_path: Path) -> None:
    _, former, _ = build(model, method)
    former.save(tmp_path / "policy-00004")
    former.load(tmp_path / "policy-00004")
    (file,) = (tmp_path / "policy-00004").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match=rf"policy-00004 is damaged: {file.name} has another .*from a copy"):
        former.load(tmp_path / "policy-00004")
    (tmp_path / "policy-00004/hashes.json").unlink()  # of an older version
    former.load(tmp_path / "policy-00004")
