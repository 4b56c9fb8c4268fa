"""Training a DoRA: it starts at its reference, its lengths do not decay, and a resumed run ends where another does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.config.schema import Config
from diffalign.models.adapters.lora_file import LORA_FILE
from diffalign.training.build import build
from diffalign.training.inspect.dry_run import describe_run
from diffalign.training.processes import make_accelerator
from diffalign.training.run import run_training


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_it_starts_at_log_2_and_a_resumed_run_is_the_same(
    make_config: Callable[..., Config], tiny_sd: Path, tmp_path: Path, precision: str
) -> None:
    shared = {
        "tuning.use_dora": True,
        "tuning.rank": 2,
        "training.mixed_precision": precision,
        "training.learning_rate": 1e-3,
        "training.lr_scheduler": "constant",
        "training.lr_warmup_steps": 0,
        "training.checkpointing_steps": 1,
        "training.max_train_steps": 3,
    }
    whole = make_config(tiny_sd, {**shared, "output_dir": str(tmp_path / "whole")})
    run_training(whole)
    lines = [json.loads(line) for line in (Path(whole.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == float(torch.tensor(2.0).log())
    assert abs(lines[-1]["loss"] - lines[0]["loss"]) > 1e-5
    other = {**shared, "output_dir": str(tmp_path / "parts")}
    run_training(make_config(tiny_sd, {**other, "training.max_train_steps": 1}))
    run_training(make_config(tiny_sd, {**other, "training.resume_from_checkpoint": "latest"}))
    one, two = load_file(tmp_path / "whole" / LORA_FILE), load_file(tmp_path / "parts" / LORA_FILE)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)

    run = build(config := make_config(tiny_sd, shared), make_accelerator(config))
    assert "DoRA rank 2" in describe_run(run)
    start = {name: p.detach() for name, p in run.unet.named_parameters() if "magnitude" in name}
    assert all(not torch.equal(one[f"unet.{n.removesuffix('.default.weight')}"], p) for n, p in start.items())
    trained, lengths = run.optimizer.param_groups
    assert (trained["weight_decay"], lengths["weight_decay"]) == (0.01, 0.0)
    assert len(lengths["params"]) == len(start)
    assert len(trained["params"]) == 2 * len(start)
