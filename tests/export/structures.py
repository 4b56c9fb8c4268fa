"""The released models' structures: their UNets without weights, and an SDXL of full depth that is narrow."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from tests.gpu_models import SDXL_UNET
from tests.tiny import _text_config, _tokenizer, make_tiny

_SD = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
}
UNETS = {
    "sdxl": SDXL_UNET,
    "sd15": _SD | {"attention_head_dim": 8, "cross_attention_dim": 768},
    "sd2": _SD | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
}


@functools.cache
def outline(structure: str) -> torch.nn.Module:
    """The UNet as it was released, on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[structure])


def make_deep(directory: Path, family: str) -> Path:
    """A pipeline folder with as many levels, blocks and layers as SDXL, SD1.5 ("sd") or SD2 ("sd2"), and few channels.

    Random weights of every parameter, norms' and biases' too.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    structure = {"sd": "sd15"}.get(family, family)
    make_tiny(directory, "sdxl" if family == "sdxl" else "sd")
    narrow = {"norm_num_groups": 8, "attention_head_dim": 4, "sample_size": 16}
    narrow["block_out_channels"] = tuple(c // 20 for c in UNETS[structure]["block_out_channels"])
    narrow["cross_attention_dim"] = 32
    if family == "sdxl":
        narrow |= {"cross_attention_dim": 32 + 48, "addition_time_embed_dim": 8}
        narrow["projection_class_embeddings_input_dim"] = 6 * 8 + 48
    words = len(_tokenizer(directory / "tokenizer", pad_token="!" if family == "sd2" else "<|endoftext|>"))
    first = _text_config(words, width=32, act="gelu" if family == "sd2" else "quick_gelu")
    first.num_hidden_layers = 23 if family == "sd2" else 12  # SD2 reads the layer before the last, and keeps no other
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        parts = {
            "unet": UNet2DConditionModel(**UNETS[structure] | narrow),
            "vae": AutoencoderKL(
                sample_size=64,
                block_out_channels=(8, 16, 32, 32),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                norm_num_groups=4,
                scaling_factor=0.13025 if family == "sdxl" else 0.18215,
                force_upcast=False,
            ),
            "text_encoder": CLIPTextModel(first),
        }
        if family == "sdxl":
            second = _text_config(words, width=48, act="gelu", projection=48)
            second.num_hidden_layers = 32
            parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
        for name, part in parts.items():
            for p in part.parameters():
                p.data += 0.02 * torch.randn(p.shape)
            part.save_pretrained(directory / name)
    return directory
