"""Shared fixtures. Everything runs offline, on one thread, with the same small model folders for every room."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)  # small tensors: threads cost more than they give, and the tests run side by side

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs CUDA where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def golden() -> dict:
    """The authors' numbers; tests/golden/README.md says who computed what."""
    return json.loads((ROOT / "tests/golden/pairs.json").read_text())


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight SD1.5-structured pipeline folder."""
    from tests.tiny import make_tiny

    return Path(make_tiny(tmp_path_factory.mktemp("tiny") / "sd", "sd"))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight SDXL-structured pipeline folder."""
    from tests.tiny import make_tiny

    return Path(make_tiny(tmp_path_factory.mktemp("tiny") / "sdxl", "sdxl"))
