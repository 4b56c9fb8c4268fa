"""Training a LoRA on a base in 8 or 4 bits: it starts at log 2 and ends, resumed or not, at the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.config.schema import Config
from diffalign.errors import DiffalignError
from diffalign.models.adapters.lora_file import LORA_FILE
from diffalign.training.build import build
from diffalign.training.inspect.dry_run import describe_run
from diffalign.training.processes import make_accelerator
from diffalign.training.run import run_training

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize(("kind", "precision"), [("int8", "no"), ("nf4", "bf16")])
def test_it_starts_at_log_2_and_a_resumed_run_is_the_same(
    make_config: MakeConfig, tiny_sdxl: Path, tmp_path: Path, kind: str, precision: str
) -> None:
    shared = {
        "tuning.quantize_base": kind,
        "training.mixed_precision": precision,
        "training.lr_scheduler": "constant",
        "training.checkpointing_steps": 1,
        "training.max_train_steps": 3,
    }
    whole = make_config(tiny_sdxl, {**shared, "output_dir": str(tmp_path / "whole")})
    run_training(whole)
    lines = [json.loads(line) for line in (Path(whole.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == float(torch.tensor(2.0).log())
    assert lines[0]["grad_norm"] > 0
    assert abs(lines[-1]["loss"] - lines[0]["loss"]) > 1e-5
    other = {**shared, "output_dir": str(tmp_path / "parts")}
    run_training(make_config(tiny_sdxl, {**other, "training.max_train_steps": 1}))
    run_training(make_config(tiny_sdxl, {**other, "training.resume_from_checkpoint": "latest"}))
    one, two = load_file(tmp_path / "whole" / LORA_FILE), load_file(tmp_path / "parts" / LORA_FILE)
    assert all(torch.equal(one[name], two[name]) for name in one)
    run = build(whole, make_accelerator(whole))
    assert f"on a base in {kind}" in describe_run(run)


def test_stored_errors_of_another_base_are_not_used(make_config: MakeConfig, tiny_sdxl: Path, tmp_path: Path) -> None:
    """One latent cache, whose reference errors are those of the base as it is, and of its codes."""
    shared: dict[str, object] = {
        "data.cache_dir": str(tmp_path / "cache"),
        "data.cache_reference_errors": True,
        "data.draws_per_pair": 1,
        "training.max_train_steps": 1,
    }
    for kind in (None, "nf4"):
        output_dir = tmp_path / str(kind)
        run_training(make_config(tiny_sdxl, {**shared, "tuning.quantize_base": kind, "output_dir": str(output_dir)}))
        line = json.loads((output_dir / "metrics.jsonl").read_text().splitlines()[0])
        assert line["loss"] == float(torch.tensor(2.0).log())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.compile": True}, r"int8 is not supported with model\.compile"),
        ({"tuning.method": "full"}, r"quantize_base: only tuning\.method: .*lora.* has this setting"),
        ({"tuning.use_dora": True}, "a DoRA reads the lengths"),
        ({"tuning.quantize_base": "int3"}, "quantize_base.*'int8' or 'nf4'"),
    ],
)
def test_what_cannot_be_together_is_refused(
    change: dict[str, object], message: str, make_config: MakeConfig, tiny_sd: Path
) -> None:
    with pytest.raises(DiffalignError, match=message):
        make_config(tiny_sd, {"tuning.quantize_base": "int8", **change}).tuning.check()
