"""Single files, read back by diffusers' `from_single_file`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign.engine.schedule import NoiseSchedule
from diffalign.export.extract import Extraction, extract_lora
from diffalign.export.kohya import export_kohya
from diffalign.export.names import ExportError
from diffalign.export.single_file import export_single_file, unread_in_comfyui
from diffalign.models.adapters.save_load import load_pipeline
from diffalign.models.loading.base import load_base
from diffalign.models.loading.family import ModelError
from diffalign.models.spec import ModelSpec
from tests.conftest import ROOT
from tests.export.structures import make_deep
from tests.models.adapters.test_merge import PIPELINES, by_hand, write_full, write_lora
from tests.models.conftest import Model, make_model, picture
from tests.tolerance import assert_same_picture

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def read(file: Path, config: Path, family: str):
    return PIPELINES[family].from_single_file(str(file), config=str(config), torch_dtype=torch.float32)


def weights(pipeline) -> dict[str, torch.Tensor]:
    """All weights of a pipeline by part and name."""
    parts = {part: getattr(pipeline, part, None) for part in PARTS}
    return {f"{p}.{n}": v for p, module in parts.items() if module is not None for n, v in module.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_full_tuning_comes_back_to_the_bit_and_makes_the_same_image(model: Model, tmp_path: Path) -> None:
    run = write_full(model, tmp_path / "run", 1)
    args = {"base": str(model.folder), "dtype": "fp32"}
    file = export_single_file(run, tmp_path / "tuned.safetensors", **args)
    ours, theirs = load_pipeline(str(model.folder), tuned=run), read(file, model.folder, model.base.family.name)
    assert_equal(weights(theirs), weights(ours))
    assert_same_picture(picture(theirs), picture(ours))
    assert np.abs(picture(theirs) - picture(load_pipeline(str(model.folder)))).max() > 1e-3


def test_a_lora_is_merged_in_float64_and_rounded_once(model: Model, tmp_path: Path) -> None:
    targets = ("to_q", "to_out.0", "proj_in", "conv1", "ff.net.2")
    run = write_lora(model, tmp_path / "run", seed=1, rank=4, alpha=10, targets=targets)
    file = export_single_file(run, tmp_path / "tuned.safetensors", base=str(model.folder), dtype="fp32")
    theirs = read(file, model.folder, model.base.family.name)
    ours = load_pipeline(str(model.folder), tuned=run)
    np.testing.assert_allclose(picture(theirs), picture(ours), rtol=0, atol=1e-4)  # merged, not beside: other rounding
    assert np.abs(picture(theirs) - picture(load_pipeline(str(model.folder)))).max() > 1e-2
    ours.fuse_lora()  # peft's merge, in float32
    ours.unload_lora_weights()
    expected = weights(ours)
    assert expected.keys() == weights(theirs).keys()
    for name, value in weights(theirs).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    linear = write_lora(model, tmp_path / "linear", seed=2, rank=4, alpha=10)
    file = export_single_file(linear, tmp_path / "linear.safetensors", base=str(model.folder), dtype="fp32")
    unet = read(file, model.folder, model.base.family.name).unet.state_dict()
    for name, value in by_hand(model, [(linear, 1.0)]).items():
        torch.testing.assert_close(unet[name], value.float(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("family", "kind"), [("sdxl", "xl_base"), ("sd", "v1"), ("sd2", None)])
def test_every_export_of_a_model_of_the_released_depth_makes_the_same_picture(
    tmp_path: Path, family: str, kind: str | None
) -> None:
    """As many levels, blocks and layers as the released model has; only the channels are few.

    {single file, kohya LoRA, extracted LoRA}: each read back by diffusers.
    """
    model = make_model(make_deep(tmp_path / "base", family))
    run = write_full(model, tmp_path / "run", 1)
    file = export_single_file(run, tmp_path / "tuned.safetensors", base=str(model.folder), dtype="fp32")
    theirs = read(file, model.folder, model.base.family.name)
    ours = load_pipeline(str(model.folder), tuned=run)
    assert_equal(weights(theirs), weights(ours))
    assert_same_picture(picture(theirs), picture(ours))
    state = load_file(file)
    if kind is not None:  # SD2 is recognised by a width that this file lacks
        assert infer_diffusers_model_type(state) == kind
    expected = len(weights(ours)) - 4 * (0 if family == "sd" else 32 if family == "sdxl" else 23)  # qkv are joined
    assert len(state) == expected
    attention = [
        v.shape[2:] for k, v in state.items() if ".mid.attn_1." in k and k.endswith("weight") and ".norm." not in k
    ]
    assert attention == [(1, 1)] * 8  # of encoder and decoder: 1x1 convolutions in the released files
    prefixes = {"sdxl": "conditioner.embedders.1.model", "sd": "cond_stage_model.transformer"}
    assert any(key.startswith(prefixes.get(family, "cond_stage_model.model")) for key in state)
    targets = ("to_k", "proj_in", "conv2", "conv_shortcut", "downsamplers.0.conv", "time_embedding.linear_2")
    lora = write_lora(model, tmp_path / "lora", seed=2, rank=3, alpha=4, targets=targets)
    extract_lora(lora, tmp_path / "cut.safetensors", Extraction(energy=1.0), base=str(model.folder))
    kohya = export_kohya(lora, tmp_path / "kohya.safetensors", base=str(model.folder))
    expected = picture(load_pipeline(str(model.folder), tuned=lora))
    pipeline = load_pipeline(str(model.folder))
    assert np.abs(expected - picture(pipeline)).max() > 1e-2
    for file in (kohya, tmp_path / "cut.safetensors"):
        pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
        assert_same_picture(picture(pipeline), expected)
        pipeline.unload_lora_weights()


@pytest.mark.parametrize(("dtype", "stored"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_is_the_same_file_rounded(model: Model, tmp_path: Path, dtype: str, stored) -> None:
    run, args = write_full(model, tmp_path / "run", 1), {"base": str(model.folder)}
    full = load_file(export_single_file(run, tmp_path / "a.safetensors", dtype="fp32", **args))
    half = load_file(export_single_file(run, tmp_path / "b.safetensors", dtype=dtype, **args))
    assert_equal(half, {name: value.to(stored) for name, value in full.items()})


def test_a_unet_in_several_files_is_the_same_unet(model: Model, tmp_path: Path) -> None:
    run, args = Path(write_full(model, tmp_path / "run", 1)), {"base": str(model.folder), "dtype": "fp32"}
    one = export_single_file(run, tmp_path / "a.safetensors", **args)
    unet = model.unet()
    unet.load_state_dict(load_file(run / "unet/diffusion_pytorch_model.safetensors"))
    unet.save_pretrained(tmp_path / "shards/unet", max_shard_size="200KB")
    assert len(list((tmp_path / "shards/unet").glob("*.safetensors"))) > 1
    several = export_single_file(tmp_path / "shards", tmp_path / "b.safetensors", **args)
    assert_equal(load_file(several), load_file(one))


def edit(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def folder(models, tmp_path: Path) -> Path:
    """A copy of the tiny SDXL whose configs a test may change."""
    import shutil

    return Path(shutil.copytree(models["sdxl"].folder, tmp_path / "base"))


def test_v_prediction_and_zero_snr_are_marked(models, folder: Path, tmp_path: Path) -> None:
    run = write_full(models["sdxl"], tmp_path / "run", 1)
    edit(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    file = export_single_file(run, tmp_path / "tuned.safetensors", base=str(folder))
    assert {"v_pred", "ztsnr"} <= load_file(file).keys()
    assert unread_in_comfyui(load_base(str(folder))) == []  # of SDXL it reads both
    again = load_base(ModelSpec(str(file), single_file_config=str(models["sdxl"].folder)))  # whose configs say neither
    assert again.schedule.prediction_type == "v_prediction"
    assert again.schedule.alphas_cumprod[-1] == 0
    plain = export_single_file(run, tmp_path / "plain.safetensors", base=str(models["sdxl"].folder))
    assert not {"v_pred", "ztsnr"} & load_file(plain).keys()


@pytest.mark.parametrize(
    ("family", "width", "prediction", "terminal", "unread"),
    [
        ("sd", 768, "v_prediction", True, ["predicts v (v_prediction)", "has zero terminal SNR (zsnr)"]),
        ("sd", 768, "epsilon", False, []),
        ("sd", 1024, "v_prediction", False, []),
        ("sdxl", 2048, "epsilon", True, ["has zero terminal SNR (zsnr)"]),
    ],
)
def test_what_comfyui_does_not_read_is_named(
    models, family: str, width: int, prediction: str, terminal: bool, unread: list[str]
) -> None:
    base = copy.copy(models[family].base)
    base.unet = SimpleNamespace(config=SimpleNamespace(cross_attention_dim=width))
    base.scheduler_config = base.scheduler_config | {"rescale_betas_zero_snr": terminal}
    base.schedule = NoiseSchedule.from_config({**base.scheduler_config, "prediction_type": prediction})
    assert unread_in_comfyui(base) == unread


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        ("vae/config.json", {"scaling_factor": 0.5}, "scaling_factor = 0.5"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, r"latents_mean = \[0.0"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "another noise schedule"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts x0"),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, "text encoder 1 .* has hidden_act = 'gelu'"),
    ],
)
def test_a_base_that_would_make_wrong_images_is_refused(
    models, folder: Path, tmp_path: Path, file: str, settings: dict, words: str
) -> None:
    run = write_full(models["sdxl"], tmp_path / "run", 1)
    edit(folder / file, **settings)
    with pytest.raises(ExportError, match=words):
        export_single_file(run, tmp_path / "tuned.safetensors", base=str(folder))
    assert not list(tmp_path.glob("*tuned*")) + list(tmp_path.glob(".*partial"))


def test_the_embedded_worlds_autoencoder_has_no_place_in_a_single_file(tmp_path: Path) -> None:
    base = ROOT / "assets/world/base"
    with pytest.raises(ExportError, match="is an AutoencoderDC; a single file holds the AutoencoderKL"):
        export_single_file(base / "unet", tmp_path / "tuned.safetensors", base=str(base))


def test_weights_that_do_not_fit_the_base_are_refused(model: Model, models, tmp_path: Path) -> None:
    other = models["sd" if model.base.family.name == "sdxl" else "sdxl"]
    args = {"base": str(other.folder)}
    with pytest.raises(ModelError, match="does not fit this base: "):
        export_single_file(write_full(model, tmp_path / "full", 1), tmp_path / "tuned.safetensors", **args)
    lora = write_lora(model, tmp_path / "lora", 1, rank=4, alpha=4)
    with pytest.raises(ModelError, match="does not fit this base"):
        export_single_file(lora, tmp_path / "tuned.safetensors", **args)


def test_the_file_says_where_it_came_from(model: Model, tmp_path: Path) -> None:
    run = write_full(model, tmp_path / "run", 1)
    with safe_open(export_single_file(run, tmp_path / "a.safetensors", base=str(model.folder)), "pt") as opened:
        said = opened.metadata()
    assert said["diffalign.tuned"] == f"{Path(run).name}/unet"
    assert said["diffalign.base"] == model.folder.name
