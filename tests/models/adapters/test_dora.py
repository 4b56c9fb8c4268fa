"""DoRA: its start is the base to the bit, its forward is peft's, its files are diffusers', its change of a weight is
the paper's.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffalign.export.kohya import export_kohya
from diffalign.export.single_file import tuned_weights
from diffalign.models.adapters.core_methods import LoRA
from diffalign.models.adapters.fast_lora import DoraLinear
from diffalign.models.adapters.lora import (
    add_lora,
    fuse_lora,
    load_lora,
    lora_layers,
    lora_parameters,
    save_lora,
    start_magnitudes,
)
from diffalign.models.adapters.lora_file import LORA_FILE
from diffalign.models.adapters.merge import lora_updates, merge_into, merge_tuned
from diffalign.models.adapters.save_load import apply_tuned, find_tuned, load_pipeline, make_pipeline
from diffalign.models.kernels.checkpointing import store_for_autocast
from diffalign.models.loading.family import ModelError
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.reference import LoraOff
from tests.models.conftest import Model, move_lora, picture


def moved(model: Model, alpha: float = 8.0) -> nn.Module:
    unet = model.unet()
    add_lora(unet, rank=4, alpha=alpha, use_dora=True)
    move_lora(unet)
    return unet


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_starts_as_its_reference_to_the_bit(model: Model, dtype: torch.dtype | None) -> None:
    unet = model.unet()
    add_lora(unet, rank=4, seed=1, use_dora=True)
    fuse_lora(unet)
    assert {type(layer) for layer in lora_layers(unet)} == {DoraLinear}
    if dtype is not None:
        store_for_autocast(unet, dtype)
        start_magnitudes(unet)
    networks = Networks(
        unet, family=model.base.family, schedule=model.base.schedule, reference=LoraOff(unet), autocast_dtype=dtype
    )
    reference = networks.reference(model.xt, model.t, model.cond)
    assert torch.equal(networks.policy(model.xt, model.t, model.cond), reference)
    with torch.no_grad():
        lora_parameters(unet)[2].mul_(1.1)  # a length alone acts
    assert not torch.equal(networks.policy(model.xt, model.t, model.cond), reference)
    assert torch.equal(networks.reference(model.xt, model.t, model.cond), reference)


@pytest.mark.parametrize("bias", [True, False])
def test_answer_and_gradients_are_pefts(bias: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias=bias).requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=True, init_lora_weights=False)
    network = inject_adapter_in_model(config, nn.Sequential(base))
    (layer,) = lora_layers(network)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(torch.linspace(0.5, 2, 5))
    x, answers = torch.randn(2, 7, 6), []
    for fused in (False, True):
        if fused:
            fuse_lora(network)
        y = network(own := x.clone().requires_grad_())
        answers.append((y, *torch.autograd.grad(y.square().sum(), [own, *lora_parameters(network)])))
    assert type(layer) is DoraLinear
    for theirs, ours in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_diffusers_and_a_reload_make_the_same_image(model: Model, tmp_path: Path) -> None:
    unet = moved(model)
    file = save_lora(unet, tmp_path, model.base.family)
    with safe_open(file, framework="pt") as opened:
        assert '"unet.use_dora": true' in opened.metadata()["lora_adapter_metadata"]
    pipeline = make_pipeline(model.base)
    plain = picture(pipeline)
    pipeline.unet = unet
    expected = picture(pipeline)
    assert np.abs(expected - plain).max() > 0.01
    theirs = (
        type(pipeline).from_pretrained(model.folder, safety_checker=None)
        if model.base.family.name == "sd"
        else (diffusers.StableDiffusionXLPipeline.from_pretrained(model.folder))
    )
    theirs.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    np.testing.assert_allclose(picture(theirs), expected, atol=1e-5)
    np.testing.assert_allclose(picture(load_pipeline(str(model.folder), tuned=str(file))), expected, atol=1e-5)
    again = model.unet()
    load_lora(again, file)
    assert all(torch.equal(a, b) for a, b in zip(lora_parameters(again), lora_parameters(unet), strict=True))


def test_it_merges_as_peft_merges_it(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["sd"]
    unet = moved(model)
    file = save_lora(unet, tmp_path, model.base.family)
    for layer in lora_layers(unet):
        layer.merge()
    expected = {name.replace(".base_layer", ""): value for name, value in unet.state_dict().items()}
    merge_into(ours := model.unet(), [(str(file), 1.0)])
    exported = tuned_weights(model.base.unet, find_tuned(file))
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(exported(name).float(), value)
    fresh = type("Base", (), {"unet": model.unet(), "family": model.base.family, "source": "tiny"})()
    written = merge_tuned(fresh, [(str(file), 1.0)], tmp_path / "merged")
    assert written.name == "unet"  # a full one: there is no LoRA with this change


def test_what_it_cannot_be_is_refused(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["sd"]
    file = save_lora(moved(model), tmp_path, model.base.family)
    with pytest.raises(ModelError, match=r"is a DoRA, whose change .*--to single-file"):
        export_kohya(file, tmp_path / "out.safetensors", base=str(model.folder))
    with pytest.raises(ModelError, match="is a DoRA"):
        list(lora_updates(model.unet(), file))
    with pytest.raises(ModelError, match="is a DoRA, and its strength cannot be changed"):
        apply_tuned(make_pipeline(model.base), file, strength=0.5)
    with pytest.raises(ModelError, match=r"is a DoRA, and tuning.use_dora is false; set tuning.use_dora: true"):
        LoRA(resume_lora=str(file)).check_base(model.unet())
    LoRA(resume_lora=str(file), use_dora=True).check_base(model.unet())
    with pytest.raises(ModelError, match=r"tuning.use_dora: down_blocks.*conv1 is a .*Conv.*linear layers alone"):
        LoRA(rank=2, target_modules=("conv1",), use_dora=True).check_base(model.unet())
    plain = model.unet()
    add_lora(plain, rank=4, alpha=8)
    with pytest.raises(ModelError, match="has use_dora = True, this run's adapter False"):
        load_lora(plain, file)
    (tmp_path / "plain").mkdir()
    other = save_lora(plain, tmp_path / "plain", model.base.family)
    with pytest.raises(ModelError, match=r"is a plain LoRA, and tuning.use_dora is true"):
        LoRA(resume_lora=str(other), use_dora=True).check_base(model.unet())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, name: state.pop(name), "has no lora_magnitude_vector, as every layer of a DoRA"),
        (
            lambda state, name: state.update({name: state[name][:-1].clone()}),
            "required: one length for each output",
        ),
    ],
)
def test_lengths_that_are_not_all_there_are_refused(models, tmp_path: Path, change, message: str) -> None:
    model = models["sd"]
    state = load_file(save_lora(moved(model, alpha=4.0), tmp_path, model.base.family))
    change(state, sorted(name for name in state if name.endswith("magnitude_vector"))[0])
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=message):
        load_lora(model.unet(), tmp_path / "x.safetensors")
