"""The memory of a run by what it is for, counted from its config: no weights are read, and any machine will do.

Weights, gradients and optimiser states follow from the parameters; activations are what one forward of a micro-batch
stores for its backward (`activation_memory.py`), on the meta device. Not counted: kernels' own memory, fragmentation,
the second forward of a checkpoint, the loss, what a source samples, and under FSDP2 the whole networks that sampling
and held-out pairs need (`Networks.gathered`). `dry_run.py` measures activations instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from diffalign.config.schema import Config
from diffalign.experimental.fusing import fuse_kernels
from diffalign.io.weight_files import read_header
from diffalign.models.adapters.methods import Start, TuningMethod
from diffalign.models.kernels.attention import set_attention
from diffalign.models.kernels.checkpointing import Checkpointing, set_checkpointing, store_for_autocast
from diffalign.models.loading.base import outline_base
from diffalign.models.loading.components import TEXT_STEM, find_folder
from diffalign.models.loading.stored import UNET_STEM, choose_weights
from diffalign.models.policy.sharding import parts
from diffalign.models.spec import ModelSpec
from diffalign.training.distributed.launcher_settings import shards
from diffalign.training.inspect.activation_memory import SavedForBackward
from diffalign.training.inspect.meta_forward import FusedAttention, cast_as_autocast, half_inputs, unet_inputs
from diffalign.training.processes import launched_processes

OPTIMIZER_BYTES = {
    "adamw": 8.0,
    "adamw_8bit": 2.0,
    "adamw_bf16": 8.0,
    "adamw_8bit_bf16": 2.0 + 2 * 4 / 256,  # two codes, and a share of two scales
    "adafactor": 4.0,
}  # state per trained parameter, at most
_ENCODERS = {"vae": UNET_STEM, "text_encoder": TEXT_STEM, "text_encoder_2": TEXT_STEM}


@dataclass(frozen=True)
class Sizes:
    """Numbers and bytes of a network's parameters."""

    parameters: int
    weights: int  # bytes
    trained: int
    gradients: int  # bytes


Counted = tuple[Sizes, float, float]  # and bytes of casts, and of one image's activations


def sizes_of(unet: nn.Module) -> Sizes:
    """Of a UNet that is prepared for training; where it is sharded, of this process's part.

    Weights that are stored as codes are buffers.
    """
    own = parts(unet.parameters())
    trained = parts(p for p in unet.parameters() if p.requires_grad)
    return Sizes(
        parameters=sum(p.numel() for p in own),
        weights=sum(x.numel() * x.element_size() for x in (*own, *unet.buffers())),
        trained=sum(p.numel() for p in trained),
        gradients=sum(p.numel() * p.element_size() for p in trained),
    )


def memory_parts(sizes: Sizes, config: Config, reference: str, encoders: float) -> dict[str, float]:
    """Bytes on one device besides activations, for a config without `auto`.

    reference: the kind of the run's reference, or "none". encoders: bytes of the VAE and the text encoders that stay.
    """
    copy = sizes.weights if config.training.mixed_precision == "no" else 2 * sizes.parameters
    if reference == "moving":  # in the dtype of the policy's weights
        copy = sizes.weights if config.tuning.trains_base else sizes.gradients
    is_copy = reference in ("copy", "moving") or (reference == "former" and config.tuning.trains_base)
    return {
        "weights": sizes.weights,
        "reference": copy if is_copy else 0,
        "VAE and text": encoders,
        "gradients": sizes.gradients,
        "optimizer": OPTIMIZER_BYTES[config.training.optimizer] * sizes.trained,
        "EMA": 0 if config.training.ema_decay is None else 4 * sizes.trained,
    }


def plan_memory(config: Config, known: dict[str, Counted] | None = None) -> dict[str, float]:
    """Bytes of a run on one device, for a config without `auto`. Raises DiffalignError where a model cannot be read.

    known: what was counted for other configs, and is for this one; a network is counted once.
    """
    model, training = config.model, config.training
    network = _Network(
        spec=model.spec,
        tuning=config.tuning,
        in_half=training.mixed_precision != "no",
        bf16_weights=training.bf16_weights,
        fused=model.fused_kernels,
        checkpointing=cast("Checkpointing", model.gradient_checkpointing),
        resolution=config.data.resolution,
    )
    known = {} if known is None else known
    if repr(network) not in known:
        known[repr(network)] = _counted(network)
    sizes, casts, activations = known[repr(network)]
    unloaded = config.data.cache_dir is not None and not config.validation.samples
    parts = memory_parts(sizes, config, _reference_kind(config), 0 if unloaded else _encoder_bytes(model.spec))
    if (processes := launched_processes()) > 1 and shards():  # FSDP2 cuts all of them
        parts = {name: size if name == "VAE and text" else size / processes for name, size in parts.items()}
        casts /= processes
    images = _sides(config) * training.train_batch_size * (getattr(config.objective, "points_per_forward", 1) or 1)
    return {**parts, "weight casts": casts, "activations": activations * images}


@dataclass(frozen=True)
class _Network:
    """What a UNet's sizes and the activations of an image depend on."""

    spec: ModelSpec
    tuning: TuningMethod
    in_half: bool
    bf16_weights: bool
    fused: bool
    checkpointing: Checkpointing
    resolution: int | None


def _counted(network: _Network) -> Counted:
    """Sizes, bytes of the weights that autocast casts, and bytes that one image's forward leaves for its backward."""
    base = outline_base(network.spec)
    unet, tuning = base.unet.requires_grad_(False), network.tuning  # as a base is loaded
    set_attention(unet, "auto", "cpu")
    tuning.prepare(unet, Start(weights_dtype=torch.bfloat16 if network.bf16_weights else None))
    if network.in_half and not tuning.trains_base:
        store_for_autocast(unet, torch.bfloat16)
    sizes, dtypes = sizes_of(unet), [p.dtype for p in unet.parameters()]
    if network.fused:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no overload of torch's has it
        fuse_kernels(unet, "meta")
    unet.set_attn_processor(FusedAttention())
    set_checkpointing(unet.train(), network.checkpointing)
    side = (network.resolution or base.family.default_resolution) // _vae_factor(network.spec)
    inputs = unet_inputs(unet, 2, side)
    if network.in_half:
        cast_as_autocast(unet)
        inputs = half_inputs(inputs)
    casts = [p.numel() for p, was in zip(unet.parameters(), dtypes, strict=True) if p.requires_grad and p.dtype != was]
    with SavedForBackward() as saved:
        out = unet(**inputs)[0]
    del out
    return sizes, 2 * sum(casts), saved.bytes / 2


def _sides(config: Config) -> int:
    """Images of a pair that are forwarded with grad."""
    return int(getattr(getattr(config.objective, "points", None), "sides", 2))


def _reference_kind(config: Config) -> str:
    """What the run compares with while it trains; errors that are cached before need no reference."""
    if config.source is not None and config.source.own_reference:
        return "former"
    if config.training.ref_model_sync_steps is not None:
        return "moving"
    if not config.objective.needs_reference or config.data.cache_reference_errors:
        return "none"
    return "copy" if config.tuning.trains_base else "lora_off"


def _vae_factor(spec: ModelSpec) -> int:
    return int(2 ** (len(find_folder(spec, ()).config("vae")["block_out_channels"]) - 1))


def _encoder_bytes(spec: ModelSpec) -> float:
    """Of the VAE and the text encoders in float32, from the headers of their files."""
    folder = find_folder(spec, ()).path
    there = {part: stem for part, stem in _ENCODERS.items() if (folder / part).is_dir()}
    files = [file for part, stem in there.items() for file in choose_weights(folder / part, stem, spec.variant)[1]]
    headers = [json.loads(read_header(file)) for file in files]
    return 4.0 * sum(
        _product(entry["shape"]) for header in headers for name, entry in header.items() if name != "__metadata__"
    )


def _product(numbers: Iterable[int]) -> int:
    return int(torch.Size(numbers).numel())
