"""A base model: the UNet to tune, the VAE and text encoders that encode for it, and the noise it was trained on.

Prediction type, zero terminal SNR, VAE scaling and the null prompt are read from the model's configs. A wrong
prediction type there can be overridden.
Left out: refiners, inpainting and depth UNets (other inputs), and flow-matching transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffalign.engine.schedule import NoiseSchedule
from diffalign.models.loading.components import (
    PIPELINE,
    find_folder,
    load_other_vae,
    load_scheduler,
    load_text,
    load_vae,
    outline_unet,
    read_index,
)
from diffalign.models.loading.family import ModelError, TextEncoders
from diffalign.models.loading.modules import VAE, UNet
from diffalign.models.loading.sd import StableDiffusion
from diffalign.models.loading.sdxl import StableDiffusionXL
from diffalign.models.loading.single_file import is_single_file, load_single_file
from diffalign.models.spec import ModelSpec, spec_of

_NOT_A_BASE = "refiners and pipelines saved in parts are not supported"
_MIXED = "these components do not belong together"


@dataclass
class Base:
    """A loaded base; every module is frozen, in eval mode and on the CPU until someone moves it."""

    family: StableDiffusion | StableDiffusionXL
    unet: UNet
    schedule: NoiseSchedule
    scheduler_config: dict[str, Any]  # complete: missing keys are filled with the scheduler class's defaults
    vae: VAE | None
    text: TextEncoders | None
    source: str  # the path or Hub id that was asked for, for messages and manifests


def load_base(
    model: str | Path | ModelSpec, *, vae_and_text: bool = True, torch_dtype: torch.dtype = torch.float32
) -> Base:
    """Load an SD- or SDXL-like model: a diffusers folder, a Hub id or one .safetensors file, or a spec of one.

    The spec's LoRAs are merged into the UNet: base + Σ weight · (LoRA's update), summed in float64.

    `vae_and_text=False` loads the UNet and schedule alone, for training on a cache.

    Raises ModelError (a ValueError) when something is missing, pickled, or of a kind that is not tuned here.
    """
    hide_loading_bars()
    spec = spec_of(model)
    load = _from_single_file if is_single_file(spec.name) else _from_folder
    base = checked(load(spec, vae_and_text, torch_dtype))
    if spec.merge_lora:
        from diffalign.models.adapters.merge import merge_loras_into  # which loads bases

        merge_loras_into(base.unet, spec.merge_lora)
    return base


def checked(base: Base) -> Base:
    """A base whose parts belong together, frozen, in eval mode. Raises ModelError for one that is not tuned here."""
    check_unet(base.unet, base.source)
    _check_widths(base)
    for module in (base.unet, base.vae, *(base.text.models if base.text else ())):
        if module is not None:
            module.requires_grad_(False).eval()
    if base.vae is not None:
        base.family = replace(base.family, default_resolution=_resolution(base, base.vae))
    return base


def outline_base(model: str | Path | ModelSpec) -> Base:
    """A base without VAE and text encoders, whose UNet has shapes but no weights (on the meta device).

    Only configs are read, except of a single file, which is loaded. Raises ModelError.
    """
    spec = spec_of(model)
    if is_single_file(spec.name):
        base = load_base(spec, vae_and_text=False)
        base.unet.to("meta")
        return base
    folder = find_folder(spec, ())
    read_index(folder)
    scheduler_config, schedule = load_scheduler(folder)
    unet = outline_unet(folder)
    check_unet(unet, spec.name)
    return Base(family_of(unet, spec.name), unet, schedule, scheduler_config, None, None, spec.name)


def hide_loading_bars() -> None:
    """Turns off the bars that libraries draw for reading local files (several a model); downloads keep theirs."""
    import diffusers.utils.logging
    import transformers.utils.logging
    from huggingface_hub.utils import enable_progress_bars

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()  # switches the Hub's bars off as well
    enable_progress_bars()


def vae_factor(vae: VAE) -> int:
    """How many pixels one latent position spans in each direction (diffusers' own rule)."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def check_unet(unet: UNet, source: str) -> None:
    """Raise ModelError for a UNet whose inputs or outputs are not those of plain text-to-image epsilon/v/x0 models."""
    config = unet.config
    conditions = ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
    other = [field for field in conditions if config.get(field) is not None]
    if config.in_channels != config.out_channels or other:
        raise ModelError(f"the UNet of {source!r} {_why_not_plain(config, other)}")


def _why_not_plain(config: Any, other: list[str]) -> str:
    if config.out_channels == 2 * config.in_channels:
        return (
            f"has {config.out_channels} output channels for {config.in_channels} inputs: it also predicts a variance "
            "(learned sigma), which no objective supports"
        )
    if config.in_channels != config.out_channels:
        return (
            f"takes {config.in_channels} channels and returns {config.out_channels}: an inpainting, depth or upscaling "
            "model. Only text-to-image models are supported"
        )
    what = f"has {other[0]} = {config[other[0]]!r}"
    if other[0] == "time_cond_proj_dim":
        return (
            f"{what}, an embedding of the guidance scale: a latent consistency model with guidance distilled into it, "
            "for which diffalign gives no such input. Tune the model that it was distilled from, and put an LCM-LoRA "
            "(e.g. latent-consistency/lcm-lora-sdxl) on the result"
        )
    return f"{what}, an input that diffalign does not provide; use a UNet without it"


def _from_folder(spec: ModelSpec, vae_and_text: bool, dtype: torch.dtype) -> Base:
    """The base in a pipeline folder, or in a repository of the Hub."""
    from diffusers import UNet2DConditionModel

    folder = find_folder(spec, PIPELINE if vae_and_text else ("unet",), dtype)
    index = read_index(folder)
    scheduler_config, schedule = load_scheduler(folder)  # first: it may refuse, and is small
    unet = folder.load(UNet2DConditionModel, "unet")
    family = family_of(unet, spec.name)
    vae = text = None
    if vae_and_text:
        suffixes = ("", "_2") if family.name == "sdxl" else ("",)
        missing = [name for name in (f"text_encoder{s}" for s in suffixes) if not (index.get(name) or [None])[0]]
        if missing:
            raise ModelError(f"{spec.name!r} has no {missing[0]}, which a {family.name} base needs; {_NOT_A_BASE}")
        tokenizers, encoders = zip(*(load_text(folder, suffix) for suffix in suffixes), strict=True)
        zeros = family.name == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True))
        text = TextEncoders(tokenizers, encoders, zero_empty_prompt=zeros)
        other = spec.pretrained_vae_model_name_or_path
        vae = load_vae(folder) if other is None else load_other_vae(other, dtype)
    return Base(family, unet, schedule, scheduler_config, vae, text, spec.name)


def _from_single_file(spec: ModelSpec, vae_and_text: bool, dtype: torch.dtype) -> Base:
    pipeline, scheduler_config, schedule = load_single_file(spec, vae_and_text, dtype)
    base = base_of(pipeline, scheduler_config, schedule, spec.name)
    if vae_and_text and spec.pretrained_vae_model_name_or_path is not None:
        base.vae = load_other_vae(spec.pretrained_vae_model_name_or_path, dtype)
    return base


def base_of(pipeline: Any, scheduler_config: dict[str, Any], schedule: NoiseSchedule, source: str) -> Base:
    """A base of the components of a diffusers pipeline; without text encoders where the pipeline has none."""
    text = None
    if pipeline.text_encoder is not None:
        suffixes = ("",) if getattr(pipeline, "text_encoder_2", None) is None else ("", "_2")
        zeros = len(suffixes) == 2 and bool(pipeline.config.get("force_zeros_for_empty_prompt", False))
        text = TextEncoders(
            tokenizers=tuple(getattr(pipeline, f"tokenizer{suffix}") for suffix in suffixes),
            models=tuple(getattr(pipeline, f"text_encoder{suffix}") for suffix in suffixes),
            zero_empty_prompt=zeros,
        )
    family = family_of(pipeline.unet, source)
    return Base(family, pipeline.unet, schedule, scheduler_config, pipeline.vae, text, source)


def family_of(unet: UNet, source: str) -> StableDiffusion | StableDiffusionXL:
    """The family of a UNet, by its conditioning. Raises ModelError for neither SD nor SDXL."""
    kind = unet.config.get("addition_embed_type")
    if kind is None:
        return StableDiffusion()
    if kind == "text_time":
        return StableDiffusionXL()
    raise ModelError(
        f"the UNet of {source!r} has addition_embed_type = {kind!r}; SD-like models have none, SDXL-like "
        "models 'text_time'"
    )


def _check_widths(base: Base) -> None:
    """The text encoders and the VAE must fit the UNet: refiners and mixed-up folders are named before a shape error."""
    if base.text is None:
        return
    config, encoders = base.unet.config, base.text.models
    width, expected = sum(model.config.hidden_size for model in encoders), config.cross_attention_dim
    if width != expected:
        raise ModelError(
            f"the text encoders of {base.source!r} give {width} numbers per token, its UNet's cross_attention_dim is "
            f"{expected}: {_MIXED}"
        )
    latents = None if base.vae is None else base.vae.config.get("latent_channels")
    if latents is not None and latents != config.in_channels:
        raise ModelError(
            f"the VAE of {base.source!r} makes latents of {latents} channels, its UNet takes {config.in_channels}: "
            f"{_MIXED}; name the VAE it was trained with (pretrained_vae_model_name_or_path)"
        )
    if base.family.name == "sdxl":
        time_ids = config.projection_class_embeddings_input_dim - encoders[-1].config.projection_dim
        if time_ids != 6 * config.addition_time_embed_dim:
            raise ModelError(
                f"the UNet of {base.source!r} does not take six time ids (sizes and crop); refiners, which take an "
                "aesthetic score instead, are not supported"
            )


def _resolution(base: Base, vae: VAE) -> int:
    size = base.unet.config.sample_size
    sides = size if isinstance(size, list | tuple) else [size]
    if not sides or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ModelError(
            f"the UNet of {base.source!r} has sample_size = {size!r}: unet/config.json must give the side of the "
            "latents that it was trained on, e.g. 64 for images of 512 pixels"
        )
    return max(sides) * vae_factor(vae)
