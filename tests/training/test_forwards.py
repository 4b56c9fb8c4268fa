"""Counts of images through the UNets: exact, the same after a resume, and limited by a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffalign.config.schema import Config
from diffalign.training.run import run_training

MakeConfig = Callable[..., Config]
PAIRS = 2  # of a step of the fixture's runs


def forwards(folder: str | Path) -> list[int]:
    return [json.loads(line)["unet_forwards"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("objective", "each"),
    [
        ({"name": "dpo"}, 4),  # two sides, policy and reference
        ({"name": "sft"}, 1),
        ({"name": "mapo"}, 2),
        ({"name": "inversion_dpo", "steps": 3, "substeps": 2}, 2 * 3 * 2 + 6 * 3),
        # the way up; then every point, where the policy is asked once without grad and once with
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_counted_exactly(objective: dict[str, Any], each: int, tiny_sdxl: Path, make_config: MakeConfig) -> None:
    config = make_config(tiny_sdxl, {"objective": objective, "training.max_train_steps": 2})
    run_training(config)
    assert forwards(config.output_dir) == [PAIRS * each, 2 * PAIRS * each]


@pytest.mark.parametrize(("limit", "steps"), [(8, 1), (15, 1), (16, 2), (1, 1), (1000, 4)])
def test_a_budget_is_kept(limit: int, steps: int, tiny_sdxl: Path, make_config: MakeConfig) -> None:
    """Four pairs of forwards a step and pair: no step is taken that would exceed the limit, but the first always is."""
    config = make_config(tiny_sdxl, {"training.max_unet_forwards": limit})
    run_training(config)
    assert forwards(config.output_dir) == [8 * (k + 1) for k in range(steps)]
    assert (Path(config.output_dir) / "pytorch_lora_weights.safetensors").is_file()


def test_a_resumed_run_goes_on_counting(tiny_sdxl: Path, make_config: MakeConfig) -> None:
    shared = {"training.checkpointing_steps": 2, "training.max_unet_forwards": 24}
    run_training(make_config(tiny_sdxl, {**shared, "training.max_train_steps": 2}))
    config = make_config(tiny_sdxl, {**shared, "training.resume_from_checkpoint": "latest"})
    run_training(config)
    assert forwards(config.output_dir) == [8, 16, 24]  # and not a fourth step
