"""Names of weights, against diffusers' converters for the other direction and against released files."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import (
    CHECKPOINT_KEY_NAMES,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)

from diffalign.export.layout import unet_entries
from diffalign.export.names import ExportError, open_clip_layer_module, unet_module, vae_module
from tests.export.structures import UNETS, outline

# tensors in the released UNets
COUNTS = {"sdxl": 1680, "sd15": 686, "sd2": 686}
# from the released files: what tells a resampling block, a shortcut or an embedding from its neighbours
RELEASED = {
    "sdxl": {
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "label_emb.0.0.weight": (1280, 2816),
        "middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
    },
    "sd15": {
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "input_blocks.9.0.op.weight": (1280, 1280, 3, 3),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "time_embed.2.weight": (1280, 1280),
    },
    "sd2": {"input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024), "out.2.weight": (4, 320, 3, 3)},
}


@pytest.mark.parametrize("structure", UNETS)
def test_every_tensor_of_a_released_unet_has_a_name_of_its_own_and_comes_back(structure: str) -> None:
    unet = outline(structure)
    state = unet.state_dict()
    made = {entry.name: entry.make() for entry in unet_entries(unet, state.__getitem__)}
    assert len(state) == len(made) == COUNTS[structure]
    back = convert_ldm_unet_checkpoint(dict(made), unet.config)
    assert back.keys() == state.keys()
    assert [name for name, tensor in state.items() if back[name] is not tensor] == []
    shapes = {name: tuple(made[f"model.diffusion_model.{name}"].shape) for name in RELEASED[structure]}
    assert shapes == RELEASED[structure]
    tell = {"sd15": "v1", "sd2": "v2"}.get(structure)
    assert tell is None or CHECKPOINT_KEY_NAMES[tell] in made


def test_every_module_of_the_released_vae_has_a_name_of_its_own_and_comes_back() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    state = vae.state_dict()
    made = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        made[f"first_stage_model.{vae_module(module, 4)}.{leaf}"] = tensor
    assert len(made) == len(state) == 248
    back = convert_ldm_vae_checkpoint(dict(made), vae.config)
    assert back.keys() == state.keys()
    assert [name for name, tensor in state.items() if back[name] is not tensor] == []
    released = ("decoder.up.3.upsample.conv", "encoder.down.2.block.0.nin_shortcut", "decoder.mid.attn_1.proj_out")
    assert {f"first_stage_model.{name}.weight" for name in released} <= made.keys()


@pytest.mark.parametrize(
    ("name", "original"),
    [("mlp.fc1", "mlp.c_fc"), ("layer_norm2", "ln_2"), ("self_attn.out_proj", "attn.out_proj")],
)
def test_open_clips_layer(name: str, original: str) -> None:
    assert open_clip_layer_module(name) == original


CONFIG = UNETS["sdxl"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: unet_module("down_blocks.0.motion_modules.0.proj_in", CONFIG), "UNet's down_blocks.0.motion_modules"),
        (lambda: unet_module("class_embedding.linear_1", CONFIG), "UNet's class_embedding.linear_1"),
        (lambda: unet_module("mid_block.resnets.0.norm3", CONFIG), "norm3"),
        (lambda: unet_module("down_blocks.0.resnets.0.conv1", CONFIG | {"layers_per_block": (1, 2, 2)}), "resnets"),
        (lambda: vae_module("encoder.down_blocks.0.attentions.0.to_q", 4), "VAE's encoder.down_blocks.0.attentions"),
        (lambda: vae_module("bottleneck.conv", 4), "VAE's bottleneck.conv"),
        (lambda: open_clip_layer_module("mlp.gate"), "text encoder's mlp.gate"),
    ],
)
def test_what_the_layout_has_no_place_for_is_named(call, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        call()
