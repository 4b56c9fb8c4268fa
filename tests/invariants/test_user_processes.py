"""Two processes give the update of one with user attention: each pair keeps its user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.config.schema import Config
from diffalign.contrib.ppd.weights import USER_FILE
from diffalign.training.run import run_training
from tests.data.helpers import pick_rows, write_parquet
from tests.invariants.pool import Pool
from tests.invariants.test_processes import in_two
from tests.training.test_run import metrics


def test_two_processes_give_the_update_of_one(
    make_config: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path, pool: Pool
) -> None:
    rows = [row | {"user_embed": [float(i % 3), 1.0, -0.5 * i]} for i, row in enumerate(pick_rows(12))]
    shared = {
        "tuning": {"method": "user_attention"},
        "data.path": str(write_parquet(tmp_path / "pairs.parquet", rows)),
        "data.cache_dir": str(tmp_path / "cache"),
        "training.max_train_steps": 2,
        "training.learning_rate": 1e-3,
        "training.adam_epsilon": 1e-4,  # Adam's first step is lr·sign(g): without this, rounding decides signs
        "training.gradient_accumulation_steps": 2,
    }
    found = []
    for processes in (2, 1):
        out = {"output_dir": str(tmp_path / str(processes)), "training.train_batch_size": 4 // processes}
        config = make_config(tiny_sdxl, {**shared, **out})
        if processes == 1:
            run_training(config)
        else:
            in_two(pool, config, tmp_path / "run.yaml")
        found.append((load_file(Path(config.output_dir) / USER_FILE), metrics(config.output_dir)))
    (two, lines), (one, expected) = found
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-6)
    for a, b in zip(expected, lines, strict=True):
        for name in a:
            # as in test_processes: rewards are differences of errors times 250
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=6e-5), name
