"""A base model from an open diffusers pipeline."""

from __future__ import annotations

from typing import Any

import torch

from diffalign.io.loaded_weights import check_module
from diffalign.models.loading.base import Base, base_of, checked
from diffalign.models.loading.components import complete_scheduler
from diffalign.models.loading.family import ModelError
from diffalign.models.spec import ModelSpec

NEEDED = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")


def base_of_pipeline(pipeline: Any) -> Base:
    """The parts of an open StableDiffusionPipeline or StableDiffusionXLPipeline as a base; nothing is copied.

    Training changes its UNet in place. Raises ModelError for another kind of pipeline, for a missing part, for
    weights that are not float32 (the trained copy would be rounded at every step) or not finite, and for a UNet with
    adapters.
    """
    kind = type(pipeline).__name__
    missing = [name for name in NEEDED if getattr(pipeline, name, None) is None]
    if missing:
        raise ModelError(
            f"model: {kind} has no {', '.join(missing)}; give a Hub id, a path, or a "
            "StableDiffusionPipeline or StableDiffusionXLPipeline with all of its components"
        )
    parameter = next(pipeline.unet.parameters())
    if parameter.dtype != torch.float32:
        raise ModelError(
            f"model: the pipeline's UNet is {parameter.dtype}; load it in torch.float32 "
            "(training.mixed_precision sets the compute dtype)"
        )
    if getattr(pipeline.unet, "peft_config", None):
        raise ModelError(
            "model: the pipeline's UNet has adapters; call pipeline.fuse_lora() and unload_lora_weights() first"
        )
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (module := getattr(pipeline, name, None)) is not None:
            check_module(f"model: the pipeline's {name}", module)
    source = str(pipeline.config.get("_name_or_path") or f"an open {kind}")
    scheduler_config = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    return checked(base_of(pipeline, *complete_scheduler(scheduler_config, ModelSpec(source)), source))
