"""Two processes measure held-out pairs and images, stop and choose the best weights as one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffalign.config.schema import Config
from diffalign.training.run import run_training
from diffalign.world import base_path
from tests.invariants.pool import Pool
from tests.invariants.test_processes import in_two
from tests.training.heldout.test_stopping import settings
from tests.training.test_run import metrics, weights


def test_two_processes_measure_and_stop_as_one(make_config: Callable[..., Config], pool: Pool, tmp_path: Path) -> None:
    changes = {
        "training__learning_rate": 1e-2,
        "validation__pairs_batch_size": 2,
        "training__checkpointing_steps": None,
        "validation__faithfulness": "world",
        "validation__guard_prompts": 4,
        "validation__guard_images": 2,
        "validation__num_inference_steps": 2,
    }
    one = make_config(base_path(), settings(tmp_path / "one", **changes))
    two = make_config(base_path(), settings(tmp_path / "two", **changes, training__train_batch_size=1))
    run_training(one)
    in_two(pool, two, tmp_path / "two.yaml")
    lines = [
        [{k: v for k, v in line.items() if "heldout" in k} for line in metrics(tmp_path / n)] for n in ("one", "two")
    ]
    assert len(lines[0]) == len(lines[1]) < 6  # at this rate the held-out loss rises: both stop early
    assert {"heldout/diversity", "heldout/faithfulness"} <= lines[0][0].keys()
    for a, b in zip(*lines, strict=True):
        assert a == pytest.approx(b, rel=2e-2, abs=2e-3)
    assert all(torch.allclose(a, weights(tmp_path / "two")[k], atol=1e-4) for k, a in weights(tmp_path / "one").items())
