"""A whole SD or SDXL model in the layout of the original releases, as entries that are made when they are written.

Besides names three things differ from diffusers: OpenCLIP has queries, keys and values in one matrix, its text
projection is transposed, and the VAE's attention is made of 1x1 convolutions. What no part of diffusers has is not
written either: OpenCLIP's logit_scale and SD2's last text layer, which no image depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from diffalign.export.files import TensorEntry
from diffalign.export.names import (
    UNET_PREFIX,
    VAE_PREFIX,
    ExportError,
    open_clip_layer_module,
    unet_module,
    vae_module,
)
from diffalign.models.loading.base import Base
from diffalign.models.loading.modules import VAE, TextModel, UNet

_CLIP = {"sd": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
_OPEN_CLIP = {"sd": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
_V_PREDICTION = "v_pred"  # NoobAI's marks, which ComfyUI, its kin and `load_base` believe
_ZERO_SNR = "ztsnr"


def model_entries(base: Base, unet_weight: Callable[[str], Tensor]) -> list[TensorEntry]:
    """Every tensor of the single file: the UNet with the weights that `unet_weight` gives by name, VAE, text encoders.

    Raises ExportError for a base without VAE and text encoders, or of another structure than SD's and SDXL's.
    """
    if base.vae is None or base.text is None:
        raise ExportError(f"{base.source!r} was loaded without VAE and text encoders; load it with vae_and_text=True")
    entries = [*unet_entries(base.unet, unet_weight), *_vae_entries(base.vae)]
    for index, encoder in enumerate(base.text.models):
        act = encoder.config.hidden_act
        if act == "quick_gelu" and index == 0:
            entries += _clip_entries(encoder, _CLIP[base.family.name])
        elif act == "gelu" and index == len(base.text.models) - 1:
            entries += _open_clip_entries(encoder, _OPEN_CLIP[base.family.name])
        else:
            raise ExportError(
                f"text encoder {index + 1} of {base.source!r} has hidden_act = {act!r}; readers of a single file take "
                "the first for OpenAI's CLIP (quick_gelu), SDXL's second and SD2's only one for OpenCLIP (gelu)"
            )
    marks = [
        (_V_PREDICTION, base.schedule.prediction_type == "v_prediction"),
        (_ZERO_SNR, bool(base.scheduler_config.get("rescale_betas_zero_snr"))),
    ]
    return entries + [TensorEntry(name, (0,), lambda: torch.zeros(0)) for name, holds in marks if holds]


def unet_entries(unet: UNet, weight: Callable[[str], Tensor]) -> list[TensorEntry]:
    """The UNet's tensors, of the shapes it has, with the weights that `weight` gives for its own names."""
    entries = []
    for name, own in unet.state_dict().items():
        module, _, leaf = name.rpartition(".")
        original = f"{UNET_PREFIX}{unet_module(module, unet.config)}.{leaf}"
        entries.append(TensorEntry(original, tuple(own.shape), partial(weight, name)))
    return entries


def _vae_entries(vae: VAE) -> Iterator[TensorEntry]:
    levels = len(vae.config.block_out_channels)
    for name, value in vae.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if ".attentions." in module and leaf == "weight" and value.ndim == 2:
            value = value[:, :, None, None]
        yield _plain(f"{VAE_PREFIX}{vae_module(module, levels)}.{leaf}", value)


def _clip_entries(encoder: TextModel, prefix: str) -> Iterator[TensorEntry]:
    for name, value in encoder.state_dict().items():
        yield _plain(f"{prefix}text_model.{name.removeprefix('text_model.')}", value)


def _open_clip_entries(encoder: TextModel, prefix: str) -> Iterator[TensorEntry]:
    # transformers' releases differ in whether a CLIPTextModel holds its parts below text_model
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    yield _plain(f"{prefix}token_embedding.weight", state.pop("embeddings.token_embedding.weight"))
    yield _plain(f"{prefix}positional_embedding", state.pop("embeddings.position_embedding.weight"))
    yield _plain(f"{prefix}ln_final.weight", state.pop("final_layer_norm.weight"))
    yield _plain(f"{prefix}ln_final.bias", state.pop("final_layer_norm.bias"))
    if "text_projection.weight" in state:
        yield _plain(f"{prefix}text_projection", state.pop("text_projection.weight").T)
    for name, value in state.items():
        _, _, number, inner = name.split(".", 3)  # encoder.layers.N.…
        block, (module, _, leaf) = f"{prefix}transformer.resblocks.{number}", inner.rpartition(".")
        if module == "self_attn.q_proj":
            parts = [state[f"encoder.layers.{number}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            shape = (sum(part.shape[0] for part in parts), *value.shape[1:])
            yield TensorEntry(f"{block}.attn.in_proj_{leaf}", shape, partial(torch.cat, parts))
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            yield _plain(f"{block}.{open_clip_layer_module(module)}.{leaf}", value)


def _plain(name: str, value: Tensor) -> TensorEntry:
    return TensorEntry(name, tuple(value.shape), lambda: value)
