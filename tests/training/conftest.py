"""A folder of pairs and a config maker for runs on the tiny pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.config import Config, parse_config

PAIRS = 12


@pytest.fixture(scope="session")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs of noise pictures with four prompts, in the folder layout."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for side in ("chosen", "rejected"):
        (folder / side).mkdir()
        for i in range(PAIRS):
            pixels = rng.integers(0, 255, (80, 70, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / side / f"{i:03d}.png")
    for i in range(PAIRS):
        (folder / f"{i:03d}.txt").write_text(f"a red circle {i % 4}")
    return folder


@pytest.fixture
def make_config(tmp_path: Path, pair_folder: Path) -> Callable[..., Config]:
    """`make_config(base, "section.key", value, ...)`: a four-step run on the tiny pipelines."""

    def make(base: Path, overrides: dict[str, object] | None = None) -> Config:
        tree: dict[str, dict] = {
            "model": {"pretrained_model_name_or_path": str(base)},
            "tuning": {"rank": 4, "alpha": 8},
            "objective": {"name": "dpo", "beta": 500.0},
            "data": {"path": str(pair_folder), "resolution": 32},
            "training": {
                "max_train_steps": 4,
                "train_batch_size": 2,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "report_to": "none",
            },
        }
        top: dict[str, object] = {"output_dir": str(tmp_path / "out")}
        for name, value in (overrides or {}).items():
            section, _, key = name.partition(".")
            if key:
                tree.setdefault(section, {})[key] = value
            else:
                top[section] = value
        return parse_config({**top, **tree})

    return make
