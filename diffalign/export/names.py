"""Names of modules in the original releases, from those that diffusers gives them.

    SD     CompVis' latent-diffusion         model.diffusion_model, first_stage_model, cond_stage_model
    SDXL   Stability's generative-models     model.diffusion_model, first_stage_model, conditioner.embedders

`models/ldm_names.py` has the places of the UNet's modules. Nothing here knows tensors; `layout` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffalign.errors import DiffalignError
from diffalign.models.ldm_names import unet_place

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

_VAE_ENDS = ("conv_in", "conv_out", "conv_norm_out")
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_VAE_PLACE = re.compile(r"(encoder|decoder)\.(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)")


class ExportError(DiffalignError):
    """What cannot be exported as it was asked; the message says why and what can."""


def unet_module(name: str, config: Mapping[str, Any]) -> str:
    """A UNet's module, e.g. down_blocks.1.attentions.0.proj_in as input_blocks.4.1.proj_in; without `UNET_PREFIX`.

    `config` is the UNet's: its `layers_per_block` and `up_block_types` are read.
    Raises ExportError for a module that the original layout has no place for.
    """
    if (place := unet_place(name, config)) is None:
        raise _homeless(f"the UNet's {name}")
    return place


def vae_module(name: str, levels: int) -> str:
    """An AutoencoderKL's module, e.g. decoder.up_blocks.0 of 4 as decoder.up.3; without `VAE_PREFIX`.

    Raises ExportError for a module that the original layout has no place for.
    """
    if name in ("quant_conv", "post_quant_conv"):
        return name
    half, _, end = name.partition(".")
    if half in ("encoder", "decoder") and end in _VAE_ENDS:
        return f"{half}.{end.removeprefix('conv_') if end == 'conv_norm_out' else end}"
    found = _VAE_PLACE.fullmatch(name)
    if found is None:
        raise _homeless(f"the VAE's {name}")
    half, side, level, kind, index, inner = found.groups()
    inner = inner.replace("conv_shortcut", "nin_shortcut")
    if side is None and kind == "resnets":
        return f"{half}.mid.block_{int(index) + 1}.{inner}"
    if side is None and kind == "attentions" and inner in _VAE_ATTENTION:
        return f"{half}.mid.attn_{int(index) + 1}.{_VAE_ATTENTION[inner]}"
    if side is not None:
        place = f"{half}.{side}.{levels - 1 - int(level) if side == 'up' else level}"  # up levels count backwards
        if kind == "resnets":
            return f"{place}.block.{index}.{inner}"
        if kind == f"{side}samplers":
            return f"{place}.{side}sample.{inner}"
    raise _homeless(f"the VAE's {name}")


def open_clip_layer_module(name: str) -> str:
    """A module of a CLIP text layer in OpenCLIP's names; queries, keys and values are one there, and not among them.

    Raises ExportError for a module that OpenCLIP's layer has no place for.
    """
    if name not in _OPEN_CLIP_LAYER:
        raise _homeless(f"the text encoder's {name}")
    return _OPEN_CLIP_LAYER[name]


def _homeless(what: str) -> ExportError:
    return ExportError(
        f"{what} has no place in the layout of SD and SDXL checkpoints: this base has another structure. It stays a "
        "diffusers model: give the run's own files to diffusers"
    )
