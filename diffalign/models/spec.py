"""`ModelSpec`: which model is loaded, from where, and which of its configs are overridden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelSpec:
    """A base model: its name, and options of loading; fields as in a config's `model` section."""

    pretrained_model_name_or_path: str | Path  # diffusers folder, Hub id, or one .safetensors file
    pretrained_vae_model_name_or_path: str | None = None  # another VAE, e.g. the fp16-fix one
    revision: str | None = None  # of the Hub
    variant: str | None = None  # of the weight files, e.g. fp16
    single_file_config: str | None = None  # local folder with the configs of a single file's pipeline
    prediction_type: str | None = None  # in place of the scheduler config's
    merge_lora: Mapping[str, float] | None = None  # LoRA files that become part of the base, each with its weight
    scheduler: Mapping[str, Any] | None = None  # other settings in place of its own (`engine/scheduler_override.py`)

    @property
    def name(self) -> str:
        """The model's path or Hub id, for messages and manifests."""
        return str(self.pretrained_model_name_or_path)


def spec_of(model: str | Path | ModelSpec) -> ModelSpec:
    """The model that is named by its path or Hub id alone, or by a spec."""
    return model if isinstance(model, ModelSpec) else ModelSpec(model)
