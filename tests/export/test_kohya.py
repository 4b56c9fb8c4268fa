"""LoRA files in kohya's layout, read back by diffusers' converter."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.engine.schedule import NoiseSchedule
from diffalign.export.kohya import export_kohya, kohya_module, not_in_sd_scripts
from diffalign.export.metadata import LoraModule, kohya_metadata, model_spec
from diffalign.export.names import ExportError
from diffalign.export.tuned_run import find_tuned_run
from diffalign.models.adapters.lora import LORA_FILE, load_lora
from diffalign.models.adapters.merge import merge_tuned
from diffalign.models.adapters.save_load import load_pipeline
from diffalign.models.loading.base import Base
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.sd import StableDiffusion
from diffalign.models.loading.sdxl import StableDiffusionXL
from tests.export.structures import UNETS, outline
from tests.models.adapters.test_merge import PIPELINES, assert_same, fused, write_full, write_lora
from tests.models.conftest import Model, picture

EVERYTHING = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv")


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("alpha", [4, 10])
def test_the_image_is_that_of_the_runs_own_file(model: Model, tmp_path: Path, alpha: float) -> None:
    run = write_lora(model, tmp_path / "run", seed=1, rank=4, alpha=alpha, targets=EVERYTHING)
    file = export_kohya(run, tmp_path / "mine.safetensors", base=str(model.folder))
    assert all(key.startswith("lora_unet_") for key in load_file(file))
    expected = picture(load_pipeline(str(model.folder), tuned=run))
    pipeline = PIPELINES[model.base.family.name].from_pretrained(model.folder, safety_checker=None)
    base = picture(pipeline)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    np.testing.assert_allclose(picture(pipeline), expected, rtol=0, atol=1e-5)
    assert np.abs(expected - base).max() > 1e-2
    pipeline.unload_lora_weights()
    without = {key: value for key, value in load_file(file).items() if not key.endswith(".alpha")}
    pipeline.load_lora_weights(without)  # a reader without alpha takes it for the rank
    assert bool(np.abs(picture(pipeline) - expected).max() < 1e-5) is (alpha == 4)


def test_modules_of_every_kind_come_back(model: Model, tmp_path: Path) -> None:
    targets = EVERYTHING + CONVOLUTIONS
    run = write_lora(model, tmp_path / "run", seed=1, rank=2, alpha=3, targets=targets)
    file = export_kohya(run, tmp_path / "mine.safetensors", base=str(model.folder))
    ours, theirs = model.unet(), model.unet()
    load_lora(ours, run)
    load_lora(theirs, file)
    ours, theirs = (dict(unet.named_parameters()) for unet in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_ranks_and_alphas_that_differ_by_module_stay_theirs(model: Model, tmp_path: Path) -> None:
    one = write_lora(model, tmp_path / "a", seed=1, rank=4, alpha=10)
    two = write_lora(model, tmp_path / "b", seed=2, rank=2, alpha=2, targets=("to_q", "to_v"))
    merge_tuned(model.base, [(one, 0.5), (two, 0.5)], tmp_path / "soup")
    file = export_kohya(tmp_path / "soup", tmp_path / "mine.safetensors")  # merge.json names the base
    ours, theirs = model.unet(), model.unet()
    load_lora(ours, tmp_path / "soup")
    load_lora(theirs, file)
    assert_same(fused(theirs), fused(ours), atol=1e-12)  # float64 products of weights that lie otherwise
    said = metadata(file)
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("Dynamic", "Dynamic")


@pytest.mark.parametrize("structure", UNETS)
def test_every_module_of_the_released_unets_has_a_name_that_diffusers_knows(structure: str) -> None:
    """By names alone: each module's LoRA holds a number that says which module it is."""
    unet = outline(structure)
    family = StableDiffusionXL() if structure == "sdxl" else StableDiffusion()
    base = Base(family, unet, None, {}, None, None, structure)  # type: ignore[arg-type]
    attention = [n for n, m in unet.named_modules() if n.rsplit("to_", 1)[-1] in ("q", "k", "v", "out.0")]
    assert len(attention) == {"sdxl": 560, "sd15": 128, "sd2": 128}[structure]
    state = {}
    for number, name in enumerate(attention):
        for side in ("down", "up"):
            state[f"{kohya_module(name, base)}.lora_{side}.weight"] = torch.full((1, 1), float(number))
    assert len(state) == 2 * len(attention)
    state = _maybe_map_sgm_blocks_to_diffusers(state, unet.config)
    back, _ = _convert_non_diffusers_lora_to_diffusers(state)
    for number, name in enumerate(attention):
        theirs = f"unet.{name.removesuffix('.0')}".replace(".to_", ".processor.to_")
        for side in ("down", "up"):
            assert back.pop(f"{theirs}_lora.{side}.weight").item() == number
    assert not back
    known = "input_blocks_4_1" if structure == "sdxl" else "down_blocks_1_attentions_0"
    assert kohya_module("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", base) == (
        f"lora_unet_{known}_transformer_blocks_0_attn1_to_q"
    )


def test_metadata_says_what_is_known_and_no_more(model: Model, tmp_path: Path) -> None:
    run = write_lora(model, tmp_path / "run", seed=1, rank=4, alpha=10)
    file = export_kohya(run, tmp_path / "mine.safetensors", base=str(model.folder))
    said = metadata(file)
    assert said["ss_network_module"] == "networks.lora"
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_output_name"]) == ("4", "10", "mine")
    assert said["diffalign.tuned"] == f"{Path(run).name}/{LORA_FILE}"  # and nothing of whose machine it was
    assert said["diffalign.base"] == said["ss_sd_model_name"] == model.folder.name
    content = file.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert (said.pop("sshs_model_hash"), said.pop("modelspec.hash_sha256")) == (digest, f"0x{digest}")
    assert not [key for key in said if key.startswith("modelspec.") or key == "ss_base_model_version"]  # no release


@pytest.mark.parametrize(
    ("structure", "prediction", "version", "v2", "architecture"),
    [
        ("sdxl", "v_prediction", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
        ("sdxl", "epsilon", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
        ("sd15", "epsilon", "sd_v1", "False", "stable-diffusion-v1/lora"),
        ("sd2", "epsilon", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
        ("sd2", "v_prediction", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
    ],
)
def test_a_base_of_a_released_architecture_is_named_as_kohya_names_it(
    models, tmp_path: Path, structure: str, prediction: str, version: str, v2: str, architecture: str
) -> None:
    model = models["sdxl" if structure == "sdxl" else "sd"]
    run = find_tuned_run(write_lora(model, tmp_path / "run", seed=1, rank=4, alpha=4), "stabilityai/a-base")
    tiny = model.base
    schedule = NoiseSchedule.from_config({**tiny.scheduler_config, "prediction_type": prediction})
    base = Base(tiny.family, outline(structure), schedule, tiny.scheduler_config, None, None, structure)
    conv = [LoraModule("conv", torch.zeros(8, 3, size, size), torch.zeros(5, 8, 1, 1), 4.0) for size in (1, 3)]
    said = kohya_metadata(base, run, conv, "mine")
    assert (said["ss_sd_model_name"], said["ss_network_dim"]) == ("stabilityai/a-base", "8")
    assert json.loads(said["ss_network_args"]) == {"conv_dim": "8", "conv_alpha": "4"}
    assert said["modelspec.resolution"] == "64x64"
    assert datetime.fromisoformat(said["modelspec.date"]).timestamp() == float(said["ss_training_finished_at"])
    whole = model_spec(base, run, "mine", adapter=False)
    assert whole["modelspec.architecture"] == architecture.removesuffix("/lora")
    assert whole["modelspec.implementation"].startswith("https")
    assert (said["ss_base_model_version"], said["ss_v2"]) == (version, v2)
    assert said["modelspec.architecture"] == architecture
    assert (said["modelspec.implementation"] == "diffusers") == (structure != "sdxl")
    assert said["modelspec.prediction_type"] == prediction.removesuffix("_prediction")


@pytest.mark.parametrize("structure", UNETS)
def test_modules_that_sd_scripts_ignores_are_those_outside_its_classes(structure: str) -> None:
    """sd-scripts gives a LoRA to the linear and convolutional layers inside these classes of a diffusers UNet."""
    unet = outline(structure)
    classes = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    inside = [name for name, m in unet.named_modules() if type(m).__name__ in classes]
    layers = [name for name, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    ignored = not_in_sd_scripts(layers)
    assert ignored == [name for name in layers if not any(name.startswith(f"{place}.") for place in inside)]
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= set(ignored)
    assert ("add_embedding.linear_2" in ignored) is (structure == "sdxl")


def test_modules_that_sd_scripts_ignores_are_named_and_diffusers_applies_them(
    models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = models["sdxl"]
    targets = ("to_q", "conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2")
    run = write_lora(model, tmp_path / "run", seed=1, rank=2, alpha=2, targets=targets)
    file = export_kohya(run, tmp_path / "mine.safetensors", base=str(model.folder))
    assert "ignore 4 of its" in caplog.text
    assert "(add_embedding.linear_2, conv_in, conv_out and 1 more)" in caplog.text
    assert "lora_unet_label_emb_0_2.alpha" in load_file(file)
    pipeline = PIPELINES["sdxl"].from_pretrained(model.folder)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    expected = picture(load_pipeline(str(model.folder), tuned=run))
    np.testing.assert_allclose(picture(pipeline), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "stored"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_rounds_the_weights_once(model: Model, tmp_path: Path, dtype: str, stored) -> None:
    run = write_lora(model, tmp_path / "run", seed=1, rank=3, alpha=0.3)
    args = {"base": str(model.folder)}
    full = load_file(export_kohya(run, tmp_path / "a.safetensors", **args))
    half = load_file(export_kohya(run, tmp_path / "b.safetensors", dtype=dtype, **args))
    assert half.keys() == full.keys()
    for key, value in full.items():
        assert torch.equal(half[key], value if key.endswith(".alpha") else value.to(stored))


def test_what_is_no_lora_of_a_unet_is_refused(model: Model, models, tmp_path: Path) -> None:
    out, args = tmp_path / "mine.safetensors", {"base": str(model.folder)}
    with pytest.raises(ExportError, match=r"full UNet, which is no LoRA: .*--extract-rank 64.*--to single-file"):
        export_kohya(write_full(model, tmp_path / "full", 1), out, **args)
    run = write_lora(model, tmp_path / "run", seed=1, rank=4, alpha=10)
    other = models["sd" if model.folder.name == "sdxl" else "sdxl"]
    with pytest.raises(ModelError, match="does not fit this base"):
        export_kohya(run, out, base=str(other.folder))
    state = load_file(Path(run) / LORA_FILE)
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    extra = {f"{text}.lora_A.weight": torch.zeros(4, 32), f"{text}.lora_B.weight": torch.zeros(32, 4)}
    save_file(state | extra, tmp_path / "with_text.safetensors")
    with pytest.raises(ModelError, match="text_encoder"):
        export_kohya(tmp_path / "with_text.safetensors", out, **args)
    assert not out.exists()
