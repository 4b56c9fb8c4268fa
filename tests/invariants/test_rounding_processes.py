"""Two processes round alike: with different pairs, their bfloat16 weights stay equal to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffalign.config.schema import Config, save_config
from tests.invariants.pool import Pool


@pytest.mark.parametrize("optimizer", ["adamw_bf16", "adamw_8bit_bf16"])
def test_processes_hold_the_same_bits(
    optimizer: str, make_config: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path, pool: Pool
) -> None:
    settings = {
        "tuning.method": "full",
        "training.optimizer": optimizer,
        "training.mixed_precision": "bf16",
        "training.max_train_steps": 3,
    }
    save_config(make_config(tiny_sdxl, settings), tmp_path / "config.yaml")
    for ended in pool.run("steps", tmp_path / "config.yaml", tmp_path):
        assert ended.code == 0, ended.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{i}-2.pt", weights_only=True) for i in range(2))
    assert sum(x.dtype == torch.bfloat16 for x in first.values()) > 50
    assert all(torch.equal(first[name], second[name]) for name in first)
