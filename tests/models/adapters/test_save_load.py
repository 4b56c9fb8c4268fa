from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.models.adapters.lora import add_lora
from diffalign.models.adapters.save_load import apply_tuned, find_tuned, load_pipeline, load_tuned, save_tuned
from diffalign.models.loading.family import ModelError
from diffalign.models.spec import ModelSpec
from tests.models.conftest import Model, move_lora, picture
from tests.tolerance import assert_same_picture

PIPELINES = {"sd": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}


def tuned_unet(model: Model, kind: str):
    """A UNet that has been moved away from the base."""
    unet = model.unet()
    if kind == "lora":
        add_lora(unet, rank=4, alpha=10)
        move_lora(unet)
    else:
        generator = torch.Generator().manual_seed(2)
        for p in unet.parameters():
            p.data += torch.randn(p.shape, generator=generator) * 0.02
    return unet


@pytest.fixture(params=["unet", "lora"])
def kind(request) -> str:
    return request.param


def test_a_pipeline_is_what_diffusers_loads(model: Model):
    ours = load_pipeline(str(model.folder))
    theirs = PIPELINES[model.folder.name].from_pretrained(model.folder)
    assert type(ours) is type(theirs)
    assert type(ours.scheduler) is type(theirs.scheduler)
    assert (
        dict(ours.scheduler.config).items()
        >= {k: v for k, v in theirs.scheduler.config.items() if not k.startswith("_")}.items()
    )
    assert_same_picture(picture(ours), picture(theirs))
    assert getattr(ours, "safety_checker", None) is None


def test_saved_weights_make_the_same_image_everywhere(model: Model, kind: str, tmp_path: Path):
    trained = load_pipeline(str(model.folder))
    plain = picture(trained)
    trained.unet = tuned_unet(model, kind)
    expected = picture(trained)
    assert np.abs(expected - plain).max() > 0.01

    saved = save_tuned(trained.unet, tmp_path, model.base.family)
    cls = PIPELINES[model.folder.name]
    if kind == "unet":
        assert saved == tmp_path / "unet"
        assert (saved / "diffusion_pytorch_model.safetensors").is_file()
        unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
        theirs = cls.from_pretrained(model.folder, unet=unet)
    else:
        assert saved == tmp_path / "pytorch_lora_weights.safetensors"
        theirs = cls.from_pretrained(model.folder)
        theirs.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert_same_picture(picture(theirs), expected)
    for place in (tmp_path, saved):
        assert_same_picture(picture(load_pipeline(str(model.folder), tuned=str(place))), expected)

    onto = load_pipeline(str(model.folder))
    onto.unet = model.unet()
    assert load_tuned(onto.unet, tmp_path).kind == kind
    assert_same_picture(picture(onto), expected)


def test_half_precision_pipelines(model: Model, kind: str, tmp_path: Path):
    save_tuned(tuned_unet(model, kind), tmp_path, model.base.family)
    pipeline = load_pipeline(str(model.folder), tuned=str(tmp_path), torch_dtype=torch.bfloat16)
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    assert np.isfinite(picture(pipeline)).all()


def test_prediction_type_reaches_the_sampler(model: Model):
    pipeline = load_pipeline(ModelSpec(model.folder, prediction_type="v_prediction"))
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_tuned_weights_that_cannot_be_told(model: Model, tmp_path: Path):
    with pytest.raises(ModelError, match="no such path"):
        find_tuned(tmp_path / "nothing")
    for step in (20, 100, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(ModelError, match=r"use one of its checkpoints, e.g. .*checkpoint-100"):
        find_tuned(tmp_path)
    save_tuned(tuned_unet(model, "unet"), tmp_path, model.base.family)
    assert find_tuned(tmp_path).kind == "unet"
    save_tuned(tuned_unet(model, "lora"), tmp_path, model.base.family)
    with pytest.raises(ModelError, match=r"several tuned models.*unet.*pytorch_lora_weights"):
        find_tuned(tmp_path)
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ModelError, match="does not open it"):
        find_tuned(tmp_path / "model.ckpt")


def test_weights_of_another_model_are_refused(models, tmp_path: Path):
    sd, sdxl = models["sd"], models["sdxl"]
    save_tuned(tuned_unet(sdxl, "unet"), tmp_path / "full", sdxl.base.family)
    with pytest.raises(ModelError, match="does not fit this base"):
        load_tuned(sd.unet(), tmp_path / "full")
    save_tuned(tuned_unet(sdxl, "lora"), tmp_path / "lora", sdxl.base.family)
    with pytest.raises(ModelError, match="does not fit this base"):
        load_tuned(sd.unet(), tmp_path / "lora")
    with pytest.raises(ModelError, match="does not fit this base"):
        load_pipeline(str(sd.folder), tuned=str(tmp_path / "lora"))


def test_a_pipeline_takes_text_encoder_parts_too(model: Model, tmp_path: Path):
    file = save_tuned(tuned_unet(model, "lora"), tmp_path, model.base.family)
    module = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    extra = {
        f"{module}.lora_A.weight": torch.randn(4, 32, generator=generator),
        f"{module}.lora_B.weight": torch.randn(32, 4, generator=generator),
    }
    save_file(load_file(file) | extra, tmp_path / "both.safetensors")
    pipeline = load_pipeline(str(model.folder))
    apply_tuned(pipeline, tmp_path / "both.safetensors")
    assert any("lora_A" in name for name, _ in pipeline.text_encoder.named_parameters())
