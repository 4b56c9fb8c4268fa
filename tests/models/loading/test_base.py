from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from diffalign.export.layout import model_entries
from diffalign.models.loading.base import load_base, outline_base
from diffalign.models.loading.family import ModelError
from diffalign.models.spec import ModelSpec
from tests.models.conftest import Model
from tests.tiny import make_tiny


def modules(base) -> list[torch.nn.Module]:
    return [base.unet, base.vae, *base.text.models]


def edit(path: Path, **changes) -> None:
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))


def same_weights(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def single_file_state(base) -> dict[str, torch.Tensor]:
    """A base's weights under the names of single-file checkpoints; tests/export has their own tests."""
    entries = model_entries(base, base.unet.state_dict().__getitem__)
    return {entry.name: entry.make().contiguous() for entry in entries}


@pytest.fixture
def folder(models: dict[str, Model], tmp_path: Path) -> Path:
    """A copy of a tiny pipeline that a test may break."""
    return Path(shutil.copytree(models["sdxl"].folder, tmp_path / "base"))


def test_what_a_folder_says_is_what_is_loaded(model: Model):
    base = model.base
    assert base.family.name == model.folder.name
    assert base.family.default_resolution == 64
    assert same_weights(base.unet, UNet2DConditionModel.from_pretrained(model.folder, subfolder="unet"))
    for module in modules(base):
        assert not module.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())
    scheduler = {"sd": PNDMScheduler, "sdxl": EulerDiscreteScheduler}[base.family.name]
    theirs = scheduler.from_pretrained(model.folder, subfolder="scheduler").alphas_cumprod
    torch.testing.assert_close(base.schedule.alphas_cumprod, theirs.double(), rtol=1e-5, atol=0)
    assert base.schedule.prediction_type == "epsilon"


def test_half_precision_weights_are_loaded_as_float32(folder: Path):
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({key: value.half() for key, value in load_file(file).items()}, file)
    base = load_base(str(folder), vae_and_text=False)
    assert {p.dtype for p in base.unet.parameters()} == {torch.float32}
    assert base.vae is None
    assert base.text is None


def test_prediction_type_comes_from_the_config_and_can_be_overridden(tmp_path: Path):
    folder = str(make_tiny(tmp_path / "v", "sdxl", prediction_type="v_prediction"))
    assert load_base(folder).schedule.prediction_type == "v_prediction"
    overridden = load_base(ModelSpec(folder, prediction_type="sample"), vae_and_text=False)
    assert overridden.schedule.prediction_type == "sample"
    assert overridden.scheduler_config["prediction_type"] == "sample"
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample"):
        load_base(ModelSpec(folder, prediction_type="velocity"), vae_and_text=False)


def test_zero_terminal_snr_is_read(folder: Path):
    config = folder / "scheduler/scheduler_config.json"
    edit(config, rescale_betas_zero_snr=True, _class_name="DDPMScheduler", prediction_type="v_prediction")
    base = load_base(str(folder), vae_and_text=False)
    assert base.schedule.alphas_cumprod[-1] == 0
    theirs = DDPMScheduler.from_pretrained(folder, subfolder="scheduler").alphas_cumprod
    torch.testing.assert_close(base.schedule.alphas_cumprod, theirs.double(), rtol=1e-4, atol=1e-7)


def test_keys_missing_from_a_scheduler_config_mean_the_defaults_of_its_class(folder: Path):
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": "EulerDiscreteScheduler"}))
    base = load_base(str(folder), vae_and_text=False)
    assert base.scheduler_config["timestep_spacing"] == "linspace"  # Euler's default; DDIM's is leading
    assert base.schedule.timestep_spacing == "linspace"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        # Playground v2.5's and CosXL's
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, "sigma_max": 80.0}, "EDM"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"}, "EDM"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "flow matching"),
        (
            {"_class_name": "MyScheduler", "beta_start": 0.1, "beta_end": 0.2},
            "'MyScheduler'",
        ),
        ({"num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}, "lacks beta_start, beta_end"),
    ],
)
@pytest.mark.parametrize("load", [load_base, outline_base])
def test_other_noise_is_refused_before_weights_are_read(load, config: dict, words: str, folder: Path):
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=f"the scheduler of .*{folder.name}.*{words}"):
        load(str(folder))


def test_a_single_file_with_edm_keys_is_refused(models, tmp_path: Path):
    """CosXL's mark in ComfyUI's layout; the config folder's scheduler would be taken in its place."""
    file = tmp_path / "cosxl.safetensors"
    state = single_file_state(models["sdxl"].base)
    save_file(state | {"edm_vpred.sigma_max": torch.tensor(120.0)}, file)
    with pytest.raises(ModelError, match=r"cosxl.safetensors.*edm_vpred.sigma_max.*EDM.*another base"):
        load_base(ModelSpec(str(file), single_file_config=str(models["sdxl"].folder)))


def test_another_vae_replaces_the_folders_own(models, tmp_path: Path):
    model = models["sdxl"]
    other = AutoencoderKL.from_config(model.base.vae.config)
    other.save_pretrained(tmp_path / "vae")
    base = load_base(ModelSpec(str(model.folder), pretrained_vae_model_name_or_path=str(tmp_path / "vae")))
    assert same_weights(base.vae, other)
    assert not same_weights(base.vae, model.base.vae)


@pytest.mark.parametrize("forces", [True, False])
def test_force_zeros_for_empty_prompt_is_read(folder: Path, forces: bool):
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=forces)
    assert load_base(str(folder)).text.zero_empty_prompt is forces


def test_single_file_holds_the_same_model(model: Model, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    save_file(single_file_state(model.base), file)
    base = load_base(ModelSpec(str(file), single_file_config=str(model.folder)))
    assert base.family == model.base.family
    assert base.scheduler_config == model.base.scheduler_config
    assert base.text.zero_empty_prompt == model.base.text.zero_empty_prompt
    for ours, theirs in zip(modules(base), modules(model.base), strict=True):
        assert same_weights(ours, theirs)
    alone = load_base(ModelSpec(str(file), single_file_config=str(model.folder)), vae_and_text=False)
    assert alone.vae is None
    assert same_weights(alone.unet, model.base.unet)
    with pytest.raises(ModelError, match="single_file_config"):
        load_base(str(file))  # offline, and no configs given


def test_v_prediction_markers_of_a_single_file_are_believed(models, tmp_path: Path, caplog):
    model, file = models["sdxl"], tmp_path / "model.safetensors"
    markers = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    save_file(single_file_state(model.base) | markers, file)
    base = load_base(ModelSpec(str(file), single_file_config=str(model.folder)), vae_and_text=False)
    assert base.schedule.prediction_type == "v_prediction"
    assert base.schedule.alphas_cumprod[-1] == 0
    # metadata are copied by merges, so what they say alone is a warning
    save_file(single_file_state(model.base), file, metadata={"modelspec.prediction_type": "v"})
    base = load_base(ModelSpec(str(file), single_file_config=str(model.folder)), vae_and_text=False)
    assert base.schedule.prediction_type == "epsilon"
    assert "metadata say that it predicts v" in caplog.text


def test_pickled_weights_are_refused_with_a_way_out(folder: Path):
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), folder / "unet/diffusion_pytorch_model.bin")
    file.unlink()
    with pytest.raises(ModelError, match=r"only pickled weights.*diffalign convert FOLDER"):
        load_base(str(folder))
    with pytest.raises(ModelError, match="pickled checkpoint"):
        load_base("model.ckpt")


def test_a_missing_variant_lists_what_is_there(folder: Path):
    with pytest.raises(ModelError, match=r"variant: fp16.*diffusion_pytorch_model.safetensors"):
        load_base(ModelSpec(str(folder), variant="fp16"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some-org/some-model", "hf download some-org/some-model"),
        ("./no/such/folder", "does not exist"),
        ("/no/such/model.safetensors", "does not exist"),
    ],
)
def test_a_base_that_is_not_there(name: str, message: str):
    with pytest.raises(ModelError, match=message):
        load_base(name)


def test_tuned_weights_are_no_base(models, tmp_path: Path):
    models["sd"].base.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(ModelError, match="tuned weights"):
        load_base(str(tmp_path))
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, lora)
    with pytest.raises(ModelError, match="not a full SD or SDXL checkpoint"):
        load_base(str(lora))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_channels": 8}, "learned sigma"),
        ({"in_channels": 9}, "inpainting"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"addition_embed_type": "text"}, "addition_embed_type"),
    ],
)
def test_unets_with_other_inputs_or_outputs_are_refused(folder: Path, changes: dict, message: str):
    config = json.loads((folder / "unet/config.json").read_text()) | changes
    UNet2DConditionModel.from_config(config | {"addition_embed_type_num_heads": 4}).save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match=message):
        load_base(str(folder))


def test_parts_of_different_models_are_refused(models, tmp_path: Path):
    folder = Path(shutil.copytree(models["sd"].folder, tmp_path / "base"))
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(models["sdxl"].folder / "text_encoder_2", folder / "text_encoder")
    with pytest.raises(ModelError, match="do not belong together"):
        load_base(str(folder))


def test_refiners_are_refused(models, tmp_path: Path):
    folder = Path(shutil.copytree(models["sdxl"].folder, tmp_path / "base"))
    unet = UNet2DConditionModel.from_config(
        dict(models["sdxl"].base.unet.config) | {"projection_class_embeddings_input_dim": 5 * 8 + 48}
    )
    unet.save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match="refiners"):
        load_base(str(folder))
