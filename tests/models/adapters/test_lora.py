from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.models.adapters.lora import DEFAULT_TARGETS, add_lora, load_lora, lora_layers, lora_parameters, save_lora
from diffalign.models.adapters.save_load import load_pipeline
from diffalign.models.loading.family import ModelError
from diffalign.models.policy.networks import Networks
from tests.models.conftest import Model, move_lora, picture
from tests.tolerance import assert_same_picture

PIPELINES = {"sd": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}


def ask(model: Model, unet) -> torch.Tensor:
    networks = Networks(unet, family=model.base.family, schedule=model.base.schedule)
    with torch.no_grad():
        return networks.policy(model.xt, model.t, model.cond)


def test_only_lora_trains_in_float32_and_changes_nothing_at_first(model: Model):
    unet = model.unet().to(torch.bfloat16)
    add_lora(unet, rank=4)
    parameters = lora_parameters(unet)
    trainable = [p for p in unet.parameters() if p.requires_grad]
    assert {id(p) for p in parameters} == {id(p) for p in trainable}
    assert {p.dtype for p in parameters} == {torch.float32}
    names = [name for name, _ in model.unet().named_modules() if name.endswith(DEFAULT_TARGETS)]
    assert len(lora_layers(unet)) == len(names) > 0

    unet = model.unet()
    add_lora(unet, rank=4, alpha=16)
    assert torch.equal(ask(model, unet), ask(model, model.base.unet))


def test_init_depends_on_the_seed_alone(model: Model):
    def init(seed: int) -> list[torch.Tensor]:
        unet = model.unet()
        add_lora(unet, rank=4, seed=seed)
        return lora_parameters(unet)

    torch.manual_seed(5)
    first = init(0)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, init(0), strict=True))
    assert not torch.equal(first[0], init(1)[0])
    drawn = torch.cat([p.detach().flatten() for p in first[::2]])
    assert drawn.std() == pytest.approx(1 / 4, rel=0.05)
    assert not any(p.any() for p in first[1::2])


def test_update_is_alpha_over_rank_times_b_a(model: Model):
    unet = model.unet()
    add_lora(unet, rank=4, alpha=12)
    move_lora(unet)
    merged = model.unet()
    weights = dict(merged.named_parameters())
    by_name = {name.split(".lora_A")[0]: m for name, m in unet.named_modules() if name.endswith("lora_A.default")}
    for name, module in unet.named_modules():
        if name in by_name:
            delta = module.lora_B["default"].weight @ module.lora_A["default"].weight
            weights[f"{name}.weight"].data += 3.0 * delta
    torch.testing.assert_close(ask(model, unet), ask(model, merged), rtol=1e-4, atol=1e-5)
    assert (ask(model, unet) - ask(model, model.base.unet)).abs().max() > 0.1


@pytest.mark.parametrize("alpha", [4, 10])
def test_diffusers_makes_the_same_image_from_the_file(model: Model, tmp_path: Path, alpha: int):
    ours = load_pipeline(str(model.folder))
    plain = picture(ours)
    add_lora(ours.unet, rank=4, alpha=alpha)
    move_lora(ours.unet)
    file = save_lora(ours.unet, tmp_path, model.base.family)
    assert file == tmp_path / "pytorch_lora_weights.safetensors"

    theirs = PIPELINES[model.base.family.name].from_pretrained(model.folder)
    theirs.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    expected = picture(ours)
    assert_same_picture(picture(theirs), expected)
    assert np.abs(expected - plain).max() > 0.01


def test_a_file_continues_where_it_stopped(model: Model, tmp_path: Path):
    unet = model.unet()
    add_lora(unet, rank=4, alpha=10, target_modules=["to_q", "to_out.0"])
    move_lora(unet)
    save_lora(unet, tmp_path, model.base.family)
    fresh = model.unet()
    load_lora(fresh, tmp_path)  # no adapter yet
    same = model.unet()
    add_lora(same, rank=4, alpha=10, target_modules=["to_q", "to_out.0"])
    load_lora(same, tmp_path / "pytorch_lora_weights.safetensors")  # onto the adapter a config made
    half = model.unet().to(torch.bfloat16)
    load_lora(half, tmp_path)  # the base's dtype must not round the adapter
    for loaded in (fresh, same, half):
        for ours, theirs in zip(lora_parameters(loaded), lora_parameters(unet), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.requires_grad
    assert torch.equal(ask(model, fresh), ask(model, unet))
    frozen = [p for name, p in fresh.named_parameters() if ".lora_" not in name]
    assert not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 8, "alpha": 10}, r"r = 4, this run's adapter 8"),
        ({"rank": 4, "alpha": 4}, r"lora_alpha = 10"),
        ({"rank": 4, "alpha": 10, "target_modules": ["to_q"]}, "target_modules"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(model: Model, tmp_path: Path, settings: dict, message: str):
    unet = model.unet()
    add_lora(unet, rank=4, alpha=10)
    save_lora(unet, tmp_path, model.base.family)
    other = model.unet()
    add_lora(other, **settings)
    with pytest.raises(ModelError, match=message):
        load_lora(other, tmp_path)


def test_kohya_files_load_as_diffusers_loads_them(model: Model, tmp_path: Path):
    unet = model.unet()
    add_lora(unet, rank=4, alpha=10)
    for layer in lora_layers(unet)[::4]:  # kohya keeps an alpha for every module
        layer.scaling["default"] = 2 / 4
    move_lora(unet)
    alphas = {name: m.scaling["default"] * 4 for name, m in unet.named_modules() if hasattr(m, "lora_A")}
    state = {}
    for key, value in load_file(save_lora(unet, tmp_path, model.base.family)).items():
        name, _, side = key.removeprefix("unet.").removesuffix(".weight").rpartition(".")
        alpha, name = alphas[name], f"lora_unet_{name.replace('.', '_')}"
        state[f"{name}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = value
        state[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(state, tmp_path / "kohya.safetensors")
    loaded = model.unet()
    load_lora(loaded, tmp_path / "kohya.safetensors")
    torch.testing.assert_close(ask(model, loaded), ask(model, unet), rtol=1e-5, atol=1e-5)


def test_parts_that_would_be_dropped_are_refused(model: Model, tmp_path: Path):
    unet = model.unet()
    add_lora(unet, rank=4)
    file = save_lora(unet, tmp_path, model.base.family)
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    extra = {f"{text}.lora_A.weight": torch.zeros(4, 32), f"{text}.lora_B.weight": torch.zeros(32, 4)}
    save_file(load_file(file) | extra, tmp_path / "with_text.safetensors")
    with pytest.raises(ModelError, match="text_encoder"):
        load_lora(model.unet(), tmp_path / "with_text.safetensors")
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match=r"is not a LoRA.*conv_in"):
        load_lora(model.unet(), tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match="no LoRA file"):
        load_lora(model.unet(), tmp_path / "nothing.safetensors")


def test_metadata_is_small_and_readable(model: Model, tmp_path: Path):
    unet = model.unet()
    add_lora(unet, rank=4, alpha=10)
    with safe_open(save_lora(unet, tmp_path, model.base.family), framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.r"] == 4
    assert metadata["unet.lora_alpha"] == 10
    assert metadata["unet.target_modules"] == sorted(DEFAULT_TARGETS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4, "target_modules": ["to_q", "to_z"]}, r"\['to_z'\] match no module.*to_q"),
        ({"rank": 4, "target_modules": []}, "match no module"),
        ({"rank": 0}, "at least 1"),
        ({"rank": 4096}, r"rank = 4096 is above the largest rank of .*to_q,.* set tuning.rank to at most \d+"),
    ],
)
def test_settings_that_cannot_work_are_refused(model: Model, settings: dict, message: str):
    with pytest.raises(ModelError, match=message):
        add_lora(model.unet(), **settings)
    unet = model.unet()
    add_lora(unet, rank=2)
    with pytest.raises(ModelError, match="already has LoRA"):
        add_lora(unet, rank=2)


def test_dropout_is_refused_and_its_modules_named(model: Model):
    """In two passes its masks would differ: loss and gradient of other networks."""
    with pytest.raises(ModelError, match=r"dropout = 0\.5.*two passes.*remove it"):
        add_lora(model.unet(), rank=4, dropout=0.5)
    unet = model.unet()
    name, last = [(name, part) for name, part in unet.named_modules() if isinstance(part, torch.nn.Dropout)][-1]
    last.p = 0.1
    base = model.base
    Networks(unet, family=base.family, schedule=base.schedule)  # frozen, in eval mode: it never drops
    unet.requires_grad_(True)
    words = rf"dropout in 1 module: {name} \(p = 0\.1\).*unet/config\.json"
    with pytest.raises(ModelError, match=words):
        Networks(unet, family=base.family, schedule=base.schedule)
