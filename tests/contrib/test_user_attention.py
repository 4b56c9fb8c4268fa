"""User attention: nothing at the start, the base when off, one user's images when on; files and their errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional

from diffalign.contrib.negative_guidance import load_negative
from diffalign.contrib.ppd.method import UserOff
from diffalign.contrib.ppd.user_attention import (
    add_user_attention,
    is_user_weight,
    set_user,
    user_branch,
    user_parameters,
)
from diffalign.contrib.ppd.weights import USER_FILE
from diffalign.models.adapters.lora import add_lora
from diffalign.models.adapters.merge import merge_into
from diffalign.models.adapters.save_load import find_tuned, load_pipeline, load_tuned, save_tuned
from diffalign.models.kernels.attention import set_attention
from diffalign.models.kernels.checkpointing import set_checkpointing, store_for_autocast
from diffalign.models.loading.family import ModelError
from diffalign.models.policy.networks import Networks
from diffalign.types import Conditioning
from tests.models.conftest import Model, picture
from tests.tolerance import PICTURE, assert_same_picture

DIM = 3
ANNA, BEN = torch.tensor([0.3, -1.2, 0.5]), torch.tensor([-0.8, 0.1, 0.9])
DTYPES = [None, torch.bfloat16, torch.float16]


def with_users(cond: Conditioning, *users: torch.Tensor) -> Conditioning:
    return Conditioning(cond.prompt_embeds, cond.pooled, cond.time_ids, torch.stack(users))


def networks(model: Model, unet, dtype=None, module=None) -> Networks:
    return Networks(
        module or unet,
        family=model.base.family,
        schedule=model.base.schedule,
        reference=UserOff(unet),
        autocast_dtype=dtype,
    )


def move(unet, seed: int = 3, by: float = 0.1) -> None:
    """Put user attention somewhere, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in user_parameters(unet).values():
            p.add_(torch.randn(p.shape, generator=generator) * by)


def tuned(model: Model, tokens: int = 4, scale: float = 1.0):
    unet = model.unet()
    add_user_attention(unet, DIM, tokens, scale)
    move(unet)
    return unet


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_the_start_it_is_the_base_to_the_last_bit(model: Model, dtype) -> None:
    base = Networks(model.unet(), family=model.base.family, schedule=model.base.schedule, autocast_dtype=dtype)
    unet = model.unet()
    add_user_attention(unet, DIM)
    if dtype is not None:
        store_for_autocast(unet, dtype)
    nets, cond = networks(model, unet, dtype), with_users(model.cond, ANNA, BEN)
    policy, reference = nets.policy(model.xt, model.t, cond), nets.reference(model.xt, model.t, cond)
    assert torch.equal(policy, reference)
    assert torch.equal(policy, base.policy(model.xt, model.t, model.cond))
    assert policy.requires_grad
    assert policy.dtype == torch.float32


def test_the_first_gradient_is_not_zero_and_the_bases_is_none(model: Model) -> None:
    unet = model.unet()
    add_user_attention(unet, DIM)
    networks(model, unet).policy(model.xt, model.t, with_users(model.cond, ANNA, BEN)).square().mean().backward()
    for name, p in unet.named_parameters():
        assert (p.grad is not None) == is_user_weight(name), name
        if ".to_v_user." in name:
            assert float(p.grad.norm()) > 0, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_stays_the_base_after_steps_and_ignores_the_user(model: Model, dtype) -> None:
    base = Networks(model.unet(), family=model.base.family, schedule=model.base.schedule, autocast_dtype=dtype)
    expected = base.policy(model.xt, model.t, model.cond)
    unet = model.unet()
    add_user_attention(unet, DIM)
    nets, cond = networks(model, unet, dtype), with_users(model.cond, ANNA, BEN)
    optimizer = torch.optim.AdamW(user_parameters(unet).values(), lr=1e-2)
    for _ in range(3):
        nets.policy(model.xt, model.t, cond).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(nets.reference(model.xt, model.t, cond), expected)
    assert not torch.equal(nets.policy(model.xt, model.t, cond), expected)
    assert user_branch(unet).enabled


def test_a_user_changes_their_own_rows_alone(model: Model) -> None:
    nets = networks(model, tuned(model))
    one = nets.policy(model.xt, model.t, with_users(model.cond, ANNA, BEN))
    other = nets.policy(model.xt, model.t, with_users(model.cond, ANNA, ANNA))
    assert torch.equal(one[0], other[0])
    assert not torch.allclose(one[1], other[1], atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "flash", "math"])
def test_one_layer_by_hand(model: Model, backend: str) -> None:
    """Against IP-Adapter's form in float64: both attentions summed before the layer's output projection."""
    unet = model.unet()
    set_attention(unet, backend, "cpu")
    unet.double()
    add_user_attention(unet, DIM, tokens=5, scale=0.7, dtype=torch.float64)
    move(unet)
    layer = next(m for m in unet.modules() if hasattr(m, "to_v_user"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, layer.to_q.in_features, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 7, layer.to_k.in_features, generator=generator, dtype=torch.float64)
    tokens = user_branch(unet)(torch.stack([ANNA, BEN]).double())
    assert tokens.shape == (2, 5, layer.to_k.in_features)

    def heads(y: torch.Tensor) -> torch.Tensor:
        return y.reshape(2, -1, layer.heads, y.shape[-1] // layer.heads).transpose(1, 2)

    def attended(context: torch.Tensor, k, v) -> torch.Tensor:
        out = functional.scaled_dot_product_attention(heads(layer.to_q(x)), heads(k(context)), heads(v(context)))
        return out.transpose(1, 2).reshape(2, 9, -1)

    both = attended(text, layer.to_k, layer.to_v) + 0.7 * attended(tokens, layer.to_k_user, layer.to_v_user)
    torch.testing.assert_close(layer(x, encoder_hidden_states=(text, tokens)), layer.to_out[0](both))


def test_checkpointing_changes_no_gradient(model: Model) -> None:
    grads = []
    for which in ("none", "selective", "full"):
        unet = tuned(model)
        set_checkpointing(unet, which)
        unet.train()
        nets = networks(model, unet)
        cond = with_users(model.cond, ANNA, BEN)
        out = nets.policy(model.xt, model.t, cond)
        nets.reference(model.xt, model.t, cond)  # between forward and recomputation, as nothing should depend on it
        out.square().mean().backward()
        grads.append([p.grad for p in user_parameters(unet).values()])
    for plain, *recomputed in zip(*grads, strict=True):
        for other in recomputed:
            torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-7)


def test_users_and_networks_that_do_not_belong_together(model: Model) -> None:
    nets = networks(model, tuned(model))
    with pytest.raises(ModelError, match="the batch has no users"):
        nets.policy(model.xt, model.t, model.cond)
    plain = Networks(model.unet(), family=model.base.family, schedule=model.base.schedule)
    with pytest.raises(ModelError, match="this network takes none"):
        plain.policy(model.xt, model.t, with_users(model.cond, ANNA, BEN))
    with pytest.raises(ModelError, match=r"takes \[n, 3\]"):
        nets.policy(model.xt, model.t, with_users(model.cond, ANNA[:2], BEN[:2]))
    with pytest.raises(ModelError, match="no user attention to switch off"):
        UserOff(model.unet())


def test_save_and_load_give_the_same_bits(model: Model, tmp_path: Path) -> None:
    unet = tuned(model, tokens=2, scale=0.5)
    assert save_tuned(unet, tmp_path, model.base.family) == tmp_path / USER_FILE
    with safe_open(tmp_path / USER_FILE, framework="pt") as file:
        assert json.loads(file.metadata()["user_attention"]) == {"tokens": 2, "dim": DIM, "scale": 0.5}
        assert all(is_user_weight(name) for name in file.keys())  # noqa: SIM118
    cond = with_users(model.cond, ANNA, BEN)
    expected = networks(model, unet).policy(model.xt, model.t, cond)
    for place in (tmp_path, tmp_path / USER_FILE):
        fresh = model.unet()
        assert load_tuned(fresh, place).kind == "user"
        assert torch.equal(networks(model, fresh).policy(model.xt, model.t, cond), expected)
    again = model.unet()  # onto user attention that is there, as resuming does
    add_user_attention(again, DIM, 2, 0.5, seed=9)
    load_tuned(again, tmp_path)
    assert torch.equal(networks(model, again).policy(model.xt, model.t, cond), expected)


def test_a_pipeline_draws_for_its_user(model: Model, tmp_path: Path) -> None:
    save_tuned(tuned(model), tmp_path, model.base.family)
    base = picture(load_pipeline(str(model.folder)))
    pipe = load_pipeline(str(model.folder), tuned=str(tmp_path), user=ANNA.tolist())
    anna = picture(pipe)
    assert np.abs(anna - base).max() > 10 * PICTURE
    set_user(pipe.unet, BEN)
    assert np.abs(picture(pipe) - anna).max() > 10 * PICTURE
    set_user(pipe.unet, ANNA)
    assert np.array_equal(picture(pipe), anna)
    set_user(pipe.unet, None)
    assert_same_picture(picture(pipe), base)
    half = load_pipeline(str(model.folder), tuned=str(tmp_path), user=ANNA, torch_dtype=torch.bfloat16)
    assert np.abs(picture(half) - anna).mean() < 0.05


def test_errors_say_what_to_do(model: Model, tmp_path: Path) -> None:
    save_tuned(tuned(model), tmp_path, model.base.family)
    folder = str(model.folder)
    with pytest.raises(ModelError, match="no user was given"):
        load_pipeline(folder, tuned=str(tmp_path))
    with pytest.raises(ModelError, match="has 2 numbers, and this network was tuned with users of 3"):
        load_pipeline(folder, tuned=str(tmp_path), user=[0.0, 1.0])
    with pytest.raises(ModelError, match="not finite"):
        load_pipeline(folder, tuned=str(tmp_path), user=[0.0, 1.0, float("nan")])
    with pytest.raises(ModelError, match="a base does not support users"):
        load_pipeline(folder, user=ANNA)
    lora = model.unet()
    add_lora(lora, rank=2)
    save_tuned(lora, tmp_path / "lora", model.base.family)
    with pytest.raises(ModelError, match="is a LoRA, without users; remove the user"):
        load_pipeline(folder, tuned=str(tmp_path / "lora"), user=ANNA)
    save_tuned(lora, tmp_path, model.base.family)
    with pytest.raises(ModelError, match="several tuned models"):
        find_tuned(tmp_path)
    with pytest.raises(ModelError, match="already"):
        add_user_attention(lora, DIM)
    with pytest.raises(ModelError, match="at least 1"):
        add_user_attention(model.unet(), 0)
    unet = model.unet()
    add_user_attention(unet, DIM, tokens=2)
    with pytest.raises(ModelError, match="tokens = 4, this run of 2"):
        load_tuned(unet, tmp_path / USER_FILE)
    with pytest.raises(ModelError, match="already"):
        add_user_attention(unet, DIM)
    with pytest.raises(ModelError, match="cannot be merged"):
        merge_into(model.unet(), [(str(tmp_path / USER_FILE), 1.0)])
    with pytest.raises(ModelError, match="cannot have a user"):
        load_negative(folder, str(tmp_path / USER_FILE))
    with pytest.raises(ModelError, match="no user attention; remove"):
        set_user(model.unet(), ANNA)


def test_another_bases_file_is_refused_before_anything_changes(models: dict[str, Model], tmp_path: Path) -> None:
    save_tuned(tuned(models["sd"]), tmp_path, models["sd"].base.family)
    unet = models["sdxl"].unet()
    before = set(unet.state_dict())
    with pytest.raises(ModelError, match="does not fit this base"):
        load_tuned(unet, tmp_path)
    assert set(unet.state_dict()) == before
    state = {name: p.detach().clone() for name, p in user_parameters(tuned(models["sd"])).items()}
    state["user_attention.norm.weight"] = torch.ones(7)
    facts = {"user_attention": json.dumps({"tokens": 4, "dim": DIM, "scale": 1.0})}
    save_file(state, tmp_path / "bent.safetensors", metadata=facts)
    with pytest.raises(ModelError, match=r"norm.weight is \(7,\)"):
        load_tuned(models["sd"].unet(), tmp_path / "bent.safetensors")
