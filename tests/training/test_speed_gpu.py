"""The same settings on CUDA with its kernels: inductor's code, NHWC convolutions, pinned noise, cached errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.config.schema import Config
from diffalign.training.run import run_training
from tests.training.test_run import metrics

pytestmark = pytest.mark.gpu

EXACT = [
    {"model.gradient_checkpointing": "selective"},
    {"model.channels_last": True},
    {"model.channels_last": True, "model.fused_kernels": True},
    {"training.optimizer": "adamw_bf16"},
    {"training.optimizer": "adamw_8bit_bf16"},
    {"data.draws_per_pair": 2, "data.cache_reference_errors": True},
]
ROUNDED = [{"model.compile": True}, {"training.reference_batch_size": 4}]


@pytest.mark.parametrize("change", EXACT + ROUNDED)
def test_a_run_starts_at_log_2_and_its_losses_stay(
    change: dict[str, Any], make_config: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path
) -> None:
    shared = {
        "tuning.method": "full",
        "training.mixed_precision": "bf16",
        "training.gradient_accumulation_steps": 2,
        "training.max_train_steps": 3,
        "training.learning_rate": 1e-6,
        "data.cache_dir": str(tmp_path / "cache"),
    }
    for name, more in {"plain": {}, "changed": change}.items():
        run_training(make_config(tiny_sdxl, {**shared, **more, "output_dir": str(tmp_path / name)}))
    plain, changed = metrics(tmp_path / "plain"), metrics(tmp_path / "changed")
    log2 = float(torch.tensor(2.0).log())
    if change in EXACT:
        assert changed[0]["loss"] == log2
        assert changed[0]["rewards/margins"] == 0.0
    for a, b in zip(plain, changed, strict=True):
        # bf16 kernels round to 1/256 of an activation; errors are means over 256 numbers, times beta / 2 = 250
        assert b["loss"] == pytest.approx(a["loss"], abs=0.1)
    assert changed[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=0.1)
