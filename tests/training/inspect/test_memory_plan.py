"""Memory counted from a config is what the benchmarks count and the dry run measures; advice is a difference of two."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from benchmarks.memory import count
from diffalign.config.schema import Config
from diffalign.training.build import build
from diffalign.training.inspect.dry_run import dry_run, size_of
from diffalign.training.inspect.memory_advice import memory_advice
from diffalign.training.inspect.memory_plan import plan_memory
from diffalign.training.remedies import ResourceError, with_remedies

MakeConfig = Callable[..., Config]
FULL = {"tuning.method": "full", "training.optimizer": "adamw_8bit_bf16", "model.gradient_checkpointing": "selective"}


@pytest.mark.parametrize("settings", [{}, {"tuning.method": "full"}, FULL], ids=["lora", "full", "bf16_weights"])
def test_a_plan_is_the_count_of_the_benchmarks(
    settings: dict[str, object], make_config: MakeConfig, tiny_sdxl: Path, tmp_path: Path
) -> None:
    """`benchmarks.memory` is compared with the bytes of a run that trained, and with CUDA's autocast."""
    cached = {"data.cache_dir": str(tmp_path / "cache"), "training.mixed_precision": "bf16", "data.resolution": 256}
    config = make_config(tiny_sdxl, {**cached, "model.gradient_checkpointing": "none", **settings})
    # the benchmark knows SDXL's VAE, 8 pixels to a place; the tiny one's has 4
    plan = plan_memory(config.model_copy(update={"data": config.data.model_copy(update={"resolution": 128})}))
    found = count(config, _unet_config(tiny_sdxl))
    for ours, theirs in {"weights": "weights", "gradients": "gradients", "optimizer": "states"}.items():
        assert plan[ours] == pytest.approx(found[theirs], abs=1), ours
    assert plan["reference"] == pytest.approx(found["reference"], rel=0.01)  # the plan halves norms too
    assert plan["weight casts"] == pytest.approx(
        found["casts"], rel=0.01, abs=50_000
    )  # the benchmark leaves LoRA's out
    assert plan["activations"] == pytest.approx(found["activations"], rel=0.02)
    assert plan["VAE and text"] == 0


def _unet_config(folder: Path) -> dict[str, object]:
    from diffusers import UNet2DConditionModel

    return dict(UNet2DConditionModel.load_config(folder / "unet"))


def test_a_plan_is_what_the_dry_run_measures(make_config: MakeConfig, tiny_sd: Path) -> None:
    config = make_config(tiny_sd, {"tuning.method": "full", "training.ema_decay": 0.9})
    plan = plan_memory(config)
    said = dry_run(build(config, Accelerator()))
    for name in ("weights", "reference", "VAE and text", "gradients", "optimizer", "EMA"):
        assert f"{name} {size_of(plan[name])}" in said
    measured = float(re.search(r"activations ([\d.]+) MiB", said)[1]) * 2**20
    assert plan["activations"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_reference_that_follows_the_policy_has_the_dtype_of_its_weights(
    method: str, make_config: MakeConfig, tiny_sd: Path
) -> None:
    moves = {"training.ref_model_sync_steps": 16, "training.mixed_precision": "bf16", "tuning.method": method}
    config = make_config(tiny_sd, moves)
    run = build(config, Accelerator())
    assert run.moving_reference is not None
    made = run.moving_reference.state_dict()["weights"]  # of all weights, or of the adapter
    assert plan_memory(config)["reference"] == sum(w.numel() * w.element_size() for w in made)


def test_sharded_parts_are_divided(make_config: MakeConfig, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tiny_sd, {"tuning.method": "full"})
    whole = plan_memory(config)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert plan_memory(config) == whole  # DDP
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sharded = plan_memory(config)
    for name in ("weights", "reference", "gradients", "optimizer"):
        assert sharded[name] == whole[name] / 4
    assert (sharded["activations"], sharded["VAE and text"]) == (whole["activations"], whole["VAE and text"])
    assert "adamw_8bit" not in str(memory_advice(config, torch.device("cpu")))


def test_advice_is_the_difference_of_two_plans(make_config: MakeConfig, tiny_sdxl: Path) -> None:
    config = make_config(tiny_sdxl, {"tuning.method": "full", "training.train_batch_size": 4})
    advice = memory_advice(config, torch.device("cpu"))
    assert advice is not None
    assert f"about {size_of(sum(plan_memory(config).values()))}, an estimate" in advice
    smaller = {"train_batch_size": 1, "gradient_accumulation_steps": 4}
    changed = config.model_copy(update={"training": config.training.model_copy(update=smaller)})
    saved = sum(plan_memory(config).values()) - sum(plan_memory(changed).values())
    line = f"training.train_batch_size=1 training.gradient_accumulation_steps=4: {size_of(saved)} less (the same result"
    assert line in advice
    assert len(advice.partition("same count:\n")[2].splitlines()) == 3


def test_where_nothing_can_be_counted_the_settings_are_named(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "no such model")
    with pytest.raises(ResourceError, match=r"lower training\.train_batch_size \(now 2"), with_remedies(config):
        raise torch.OutOfMemoryError("CUDA out of memory")
