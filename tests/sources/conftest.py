from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.table.prompts import PromptTable
from diffalign.models.loading.base import load_base
from diffalign.models.loading.encoder import Encoder
from diffalign.models.policy.networks import Networks
from diffalign.models.spec import ModelSpec
from diffalign.sources.base import Context


@pytest.fixture
def make_context(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Context]:
    """`make_context("sdxl", prompts)`: a context around a tiny pipeline, as training builds it."""

    def make(family: str, prompts: list[str], **changes: Any) -> Context:
        base = load_base(
            ModelSpec(request.getfixturevalue(f"tiny_{family}"), prediction_type=changes.pop("kind", None))
        )
        spec: dict[str, Any] = {"run_seed": 0, "train_batch_size": 2}
        spec |= {f.name: changes.pop(f.name) for f in fields(LoaderSpec) if f.name in changes}
        networks = Networks(base.unet, family=base.family, schedule=base.schedule)
        settings: dict[str, Any] = {
            "networks": networks,
            "unet": base.unet,
            "former": None,
            "family": base.family,
            "encoder": Encoder(base),
            "table": PromptTable(prompts),
            "spec": LoaderSpec(**spec),
            "wait": lambda: None,
            "folder": tmp_path / "source",
            "saved": list,
            "latent_shape": (4, 16, 16),
            "resolution": 64,
            "device": torch.device("cpu"),
        }
        return Context(**{**settings, **changes})

    return make
