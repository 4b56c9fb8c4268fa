"""Loaded tiny bases, one of each family, and a point to evaluate them at."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.models.adapters.lora import lora_parameters
from diffalign.models.kernels.checkpointing import place
from diffalign.models.loading.base import Base, load_base
from diffalign.models.loading.encoder import Encoder
from diffalign.types import Conditioning

FAMILIES = ("sd", "sdxl")


@dataclass
class Model:
    """A tiny model: its folder, a base nobody changes, and inputs for its UNet."""

    folder: Path
    base: Base
    xt: Tensor
    t: Tensor
    cond: Conditioning

    def unet(self) -> torch.nn.Module:
        """A fresh copy of the base's UNet."""
        return copy.deepcopy(self.base.unet)


def make_model(folder: Path) -> Model:
    base = load_base(str(folder))
    place(base.unet, torch.device("cpu"))  # as its copies lie, and as training does
    encoder = Encoder(base)
    embeds = encoder.prompts(["a red circle", "a photo of the blue square"])
    geometry = torch.tensor([[480, 640, 0, 80, 64, 64], [1023, 1023, 7, 9, 64, 64]])
    return Model(
        folder=folder,
        base=base,
        xt=torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)),
        t=torch.tensor([17, 801]),
        cond=Conditioning(embeds.prompt_embeds, embeds.pooled, encoder.time_ids(geometry)),
    )


def move_lora(unet: torch.nn.Module, seed: int = 3, by: float = 0.1) -> None:
    """Put the LoRA weights somewhere, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora_parameters(unet):
            p.add_(torch.randn(p.shape, generator=generator) * by)


def picture(pipeline) -> np.ndarray:
    """Two sampling steps, as numbers."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "a red circle", num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="np"
    ).images


@pytest.fixture(scope="session")
def models(tiny_sd: Path, tiny_sdxl: Path) -> dict[str, Model]:
    return {"sd": make_model(tiny_sd), "sdxl": make_model(tiny_sdxl)}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Model:
    return models[request.param]
