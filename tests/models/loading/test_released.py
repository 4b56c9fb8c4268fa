"""Released models by their structure, on the meta device: which load, and why the others do not.

The configs are facts of the releases: SSD-1B's and Vega's depths as their authors gave them to ComfyUI
(comfy/model_detection.py), the schedulers as in the repositories of the Hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from diffalign.export.card.write import write_run_card
from diffalign.export.kohya import export_kohya
from diffalign.export.names import ExportError
from diffalign.export.single_file import export_single_file
from diffalign.models.adapters.core_methods import LoRA
from diffalign.models.adapters.lora import add_lora, save_lora
from diffalign.models.adapters.save_load import find_tuned, load_pipeline, load_tuned, make_pipeline
from diffalign.models.kernels.checkpointing import set_checkpointing
from diffalign.models.loading.base import load_base, outline_base
from diffalign.models.loading.family import ModelError
from diffalign.models.spec import ModelSpec
from tests.export.structures import UNETS
from tests.models.adapters.test_merge import PIPELINES, write_full
from tests.models.conftest import make_model, move_lora, picture
from tests.tolerance import assert_same_picture

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
EULER = SD_BETAS | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1}
TURBO = EULER | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
LCM = SD_BETAS | {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
EDM = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "rho": 7.0,
}
SSD_1B = {
    "transformer_layers_per_block": [0, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 0],
    "mid_block_type": "UNetMidBlock2D",
}
VEGA = {"transformer_layers_per_block": [0, 1, 2], "mid_block_type": "UNetMidBlock2D"}
SDXL, SD15, SD2 = UNETS["sdxl"], UNETS["sd15"], UNETS["sd2"]
LOADS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {  # UNet, scheduler, GB of the UNet in float32
    "stabilityai/stable-diffusion-xl-base-1.0": (SDXL, EULER, 10.3),
    "stabilityai/sdxl-turbo": (SDXL | {"sample_size": 64}, TURBO, 10.3),
    "stabilityai/sd-turbo": (SD2, EULER | {"timestep_spacing": "trailing"}, 3.46),
    "segmind/SSD-1B": (SDXL | SSD_1B, EULER, 5.33),
    "segmind/Segmind-Vega": (SDXL | VEGA, EULER, 2.98),
}
GUIDED = {"time_cond_proj_dim": 256}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "latent-consistency/lcm-sdxl": (SDXL | GUIDED, LCM, "256, an embedding of the guidance scale.*LCM-LoRA"),
    "latent-consistency/lcm-ssd-1b": (SDXL | SSD_1B | GUIDED, LCM, "time_cond_proj_dim = 256"),
    "SimianLuo/LCM_Dreamshaper_v7": (SD15 | GUIDED, LCM, "time_cond_proj_dim = 256"),
    "playgroundai/playground-v2.5": (SDXL, EDM, "EDMDPMSolverMultistepScheduler' means continuous EDM noise"),
}


def released(folder: Path, unet: dict[str, Any], scheduler: dict[str, Any]) -> str:
    """A repository with its configs alone."""
    for name, content in (
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel", **unet}),
        ("scheduler/scheduler_config.json", scheduler),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("name", LOADS)
def test_these_load(name: str, tmp_path: Path) -> None:
    unet, scheduler, gigabytes = LOADS[name]
    base = outline_base(released(tmp_path, unet, scheduler))
    assert 4e-9 * sum(p.numel() for p in base.unet.parameters()) == pytest.approx(gigabytes, rel=4e-3)
    assert base.family.name == ("sdxl" if unet.get("addition_embed_type") else "sd")
    assert base.schedule.timestep_spacing == scheduler["timestep_spacing"]
    LoRA(rank=8).check_base(base.unet)  # its targets exist


def test_vegas_blocks_have_the_published_sizes(tmp_path: Path) -> None:
    unet = outline_base(released(tmp_path, SDXL | VEGA, EULER)).unet
    sizes = [
        sum(p.numel() for p in part.parameters()) / 1e6 for part in (unet.down_blocks, unet.mid_block, unet.up_blocks)
    ]
    assert [round(size) for size in sizes] == [247, 31, 460]  # its model card


@pytest.mark.parametrize("name", REFUSED)
def test_these_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    unet, scheduler, why = REFUSED[name]
    with pytest.raises(ModelError, match=why):
        outline_base(released(tmp_path, unet, scheduler))


def test_ssd_1bs_structure_trains_and_is_exported(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Depths that differ within a block and between its sides, and few channels: gradients, checkpointing, files."""
    import shutil

    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "ssd"))
    narrow = {"block_out_channels": (16, 32, 64), "norm_num_groups": 8, "attention_head_dim": 4, "sample_size": 16}
    narrow |= {"cross_attention_dim": 32 + 48, "addition_time_embed_dim": 8}
    shallow = {"reverse_transformer_layers_per_block": [[2, 1, 3], [2, 1, 1], 0]}
    shallow["transformer_layers_per_block"] = [0, [2, 1], [1, 2]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        unet = UNet2DConditionModel(
            **SDXL | SSD_1B | narrow | shallow | {"projection_class_embeddings_input_dim": 6 * 8 + 48}
        )
    unet.save_pretrained(folder / "unet")
    model = make_model(folder)
    gradients = []
    for checkpointing in ("none", "selective", "full"):
        unet = model.unet()
        add_lora(unet, rank=2, alpha=2)
        move_lora(unet)
        set_checkpointing(unet, checkpointing)
        unet.train()
        unet(model.xt, model.t, **model.base.family.unet_inputs(model.cond)).sample.square().mean().backward()
        gradients.append([p.grad for p in unet.parameters() if p.requires_grad])
    assert all(bool(g.abs().max() > 0) for g in gradients[0])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)

    (tmp_path / "run").mkdir()
    save_lora(unet, tmp_path / "run", model.base.family)
    expected = picture(load_pipeline(str(folder), tuned=str(tmp_path / "run")))
    file = export_kohya(tmp_path / "run", tmp_path / "mine.safetensors", base=str(folder))
    pipeline = PIPELINES["sdxl"].from_pretrained(folder)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    assert_same_picture(picture(pipeline), expected)
    whole = export_single_file(tmp_path / "run", tmp_path / "whole.safetensors", base=str(folder), dtype="fp32")
    again = load_base(ModelSpec(str(whole), single_file_config=str(folder)))
    assert_same_picture(picture(make_pipeline(again)), expected)
    assert again.unet.config.reverse_transformer_layers_per_block == [[2, 1, 3], [2, 1, 1], 0]


def test_a_unet_alone_in_a_file_is_tuned_weights(tiny_sd: Path, tmp_path: Path) -> None:
    """As ByteDance/SDXL-Lightning has them: sdxl_lightning_4step_unet.safetensors, with diffusers' names."""
    model = make_model(tiny_sd)
    full = Path(write_full(model, tmp_path / "full", 1))
    state = load_file(full / "unet/diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "lightning_4step_unet.safetensors")
    assert find_tuned(tmp_path / "lightning_4step_unet.safetensors").kind == "unet"
    ours = picture(load_pipeline(str(tiny_sd), tuned=str(tmp_path / "lightning_4step_unet.safetensors")))
    assert_same_picture(ours, picture(load_pipeline(str(tiny_sd), tuned=str(full))))
    with pytest.raises(ExportError, match="one file of a UNet; a card describes a run"):
        write_run_card(tmp_path / "lightning_4step_unet.safetensors", base=str(tiny_sd))
    save_file(state | {"odd": torch.ones(1)}, tmp_path / "other_unet.safetensors")
    with pytest.raises(ModelError, match="1 tensors exist on one side only"):
        load_tuned(model.unet(), tmp_path / "other_unet.safetensors")
