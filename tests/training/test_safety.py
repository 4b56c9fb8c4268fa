"""Nothing good is lost: no existing model, no checkpoint, and not the weights when validation images fail."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.config.schema import Config, ConfigError
from diffalign.training.build import build
from diffalign.training.checkpoints.checkpoint import CheckpointError
from diffalign.training.checkpoints.final_weights import clear_output
from diffalign.training.metrics import Meter
from diffalign.training.processes import make_accelerator
from diffalign.training.run import run_training
from diffalign.training.step import optimizer_step
from diffalign.training.trainable import TrainingError
from tests.training.test_run import metrics, same, weights

MakeConfig = Callable[..., Config]


def names(folder: str | Path) -> set[str]:
    return {p.name for p in Path(folder).glob("checkpoint-*")}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_model_in_the_way_is_not_touched(
    overwrite: bool, make_config: MakeConfig, tiny_sd: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_sd, tmp_path / "model")
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    settings = {"output_dir": str(copy), "overwrite_output_dir": overwrite, "tuning.method": "full"}
    with pytest.raises(ConfigError, match="contains a model"):
        run_training(make_config(tiny_sd, settings))
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


def test_a_file_in_the_way_is_named(make_config: MakeConfig, tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        run_training(make_config(tiny_sd, {"output_dir": str(tmp_path / "file")}))


def test_broken_weights_are_never_written(
    make_config: MakeConfig, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that turns NaN at step 3, seen by no log before step 4: checkpoint 2 stays, nothing else appears."""
    config = make_config(
        tiny_sd,
        {"training.checkpointing_steps": 1, "training.checkpoints_total_limit": 1, "training.logging_steps": 100},
    )
    step, clip = 0, torch.nn.utils.clip_grad_norm_

    def poisoned(parameters: list[torch.nn.Parameter], limit: float, **how: Any) -> torch.Tensor:
        nonlocal step
        step += 1
        if step == 3:
            parameters[0].grad.fill_(torch.nan)
        return clip(parameters, limit, **how)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    with pytest.raises(TrainingError, match=r"no longer finite at step 3.*resume from checkpoint-2"):
        run_training(config)
    assert names(config.output_dir) == {"checkpoint-2"}
    assert not (Path(config.output_dir) / "pytorch_lora_weights.safetensors").exists()


def test_images_that_fail_do_not_cost_the_weights(
    make_config: MakeConfig, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tiny_sd, {"validation.prompts": ["a red circle"], "validation.every": 100})

    def fails(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("diffalign.training.callbacks.validation.validate", fails)
    with pytest.raises(RuntimeError, match="broken"):
        run_training(config)
    assert weights(config.output_dir)


def test_an_earlier_checkpoint_sets_later_ones_aside(
    make_config: MakeConfig, tiny_sd: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = {"training.checkpointing_steps": 1}
    config = make_config(tiny_sd, base)
    run_training(config)
    again = make_config(
        tiny_sd,
        base
        | {
            "training.resume_from_checkpoint": "checkpoint-1",
            "training.max_train_steps": 2,
            "training.checkpoints_total_limit": 1,
        },
    )
    with caplog.at_level(logging.INFO):
        run_training(again)
    assert names(config.output_dir) == {"checkpoint-2"} | {f"checkpoint-{n}.abandoned" for n in (2, 3, 4)}
    assert "checkpoint-4.abandoned" in caplog.text
    assert [line["step"] for line in metrics(config.output_dir)] == [1, 2]


def test_resuming_refuses_what_it_would_mix(make_config: MakeConfig, tiny_sd: Path, tmp_path: Path) -> None:
    first = make_config(tiny_sd, {"training.checkpointing_steps": 2})
    run_training(first)
    checkpoint = f"{first.output_dir}/checkpoint-4"
    for change, error, words in (
        ({"training.train_batch_size": 1}, CheckpointError, "at 2 pairs a step, this run takes 1"),
        ({"training.max_train_steps": 3}, CheckpointError, "past training.max_train_steps = 3"),
        ({"objective.beta": 1.0}, ConfigError, r"objective\.beta: was 500\.0, is 1\.0"),
        ({"training.learning_rate": 1e-5}, ConfigError, r"training\.learning_rate"),
    ):
        settings = {"output_dir": str(tmp_path / "other"), "training.resume_from_checkpoint": checkpoint} | change
        with pytest.raises(error, match=words):
            run_training(make_config(tiny_sd, settings))
    assert not (tmp_path / "other/unet").exists()


def test_latest_does_not_redo_a_finished_run(make_config: MakeConfig, tiny_sd: Path) -> None:
    run_training(make_config(tiny_sd))
    before = weights(make_config(tiny_sd).output_dir)
    again = make_config(tiny_sd, {"training.resume_from_checkpoint": "latest", "training.max_train_steps": 2})
    with pytest.raises(CheckpointError, match="finished run without checkpoints"):
        run_training(again)
    assert same(weights(again.output_dir), before)


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_weights(make_config: MakeConfig, tiny_sd: Path) -> None:
    settings = {"training.checkpointing_steps": 4}
    config = make_config(tiny_sd, settings)
    run_training(config)
    final = Path(config.output_dir) / "pytorch_lora_weights.safetensors"
    expected = weights(config.output_dir)
    final.unlink()
    run_training(make_config(tiny_sd, settings | {"training.resume_from_checkpoint": "latest"}))
    assert same(weights(config.output_dir), expected)


def test_online_resume_is_bitwise_with_prompts_of_any_length(
    make_config: MakeConfig, tiny_sdxl: Path, tmp_path: Path, pair_folder: Path
) -> None:
    """What is new to the text encoder after a resume is not what was new in the run that never stopped."""
    pairs = shutil.copytree(pair_folder, tmp_path / "pairs")
    for i in range(12):
        (pairs / f"{i:03d}.txt").write_text("a large blue square " + "with a small green circle " * (i % 5) + str(i))
    shared = {"data.path": str(pairs), "training.max_train_steps": 10, "training.train_batch_size": 3}
    whole = make_config(tiny_sdxl, {**shared, "training.checkpointing_steps": 5})
    run_training(whole)
    expected = weights(whole.output_dir)
    shutil.rmtree(f"{whole.output_dir}/checkpoint-10")
    resumed = {**shared, "training.checkpointing_steps": 5, "training.resume_from_checkpoint": "latest"}
    run_training(make_config(tiny_sdxl, resumed))
    assert same(weights(whole.output_dir), expected)


def test_fp16_steps_that_overflow_are_skipped_and_counted(make_config: MakeConfig, tiny_sd: Path) -> None:
    run = build(
        make_config(tiny_sd, {"training.mixed_precision": "fp16", "training.ema_decay": 0.5}),
        make_accelerator(make_config(tiny_sd)),
    )
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before, meter, batches = [p.detach().clone() for p in run.parameters], Meter(), run.source.batches()
    optimizer_step(run, batches, meter)
    values = meter.means()
    assert values["skipped_steps"] == 1.0
    assert "grad_norm" not in values
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))
    assert run.lr_scheduler.last_epoch == 0
    assert run.ema.optimization_step == 0
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    optimizer_step(run, batches, meter)
    values = meter.means()
    assert values["skipped_steps"] == 0.0
    assert values["grad_norm"] > 0
    assert run.lr_scheduler.last_epoch == 1
    assert run.ema.optimization_step == 1


def test_gradients_reach_the_optimizer_unscaled_and_clipped(make_config: MakeConfig, tiny_sd: Path) -> None:
    """What the optimiser sees: the same norm at any loss scale, and no more than max_grad_norm."""

    def seen(scale: float, limit: float | None) -> float:
        settings = {"training.max_grad_norm": limit, "training.mixed_precision": "fp16"}
        run = build(make_config(tiny_sd, settings), make_accelerator(make_config(tiny_sd)))
        run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        norms: list[float] = []
        step = run.optimizer.step

        def noted(*args: object, **kwargs: object) -> object:
            grads = [p.grad for group in run.optimizer.param_groups for p in group["params"]]
            norms.append(float(torch.stack(torch._foreach_norm(grads)).norm()))
            return step(*args, **kwargs)

        run.optimizer.step = noted
        optimizer_step(run, run.source.batches(), Meter())
        return norms[0]

    free = seen(1.0, None)
    assert seen(64.0, None) == pytest.approx(free, rel=1e-2)
    assert seen(64.0, free / 4) == pytest.approx(free / 4, rel=1e-2)


def test_the_average_is_the_average(make_config: MakeConfig, tiny_sd: Path) -> None:
    """EMA by hand from every step's weights, with diffusers' warm-up (1 + k) / (10 + k) of the decay."""
    config = make_config(tiny_sd, {"training.ema_decay": 0.9, "training.checkpointing_steps": 1})
    run_training(config)
    raw = [weights(f"{config.output_dir}/checkpoint-{k}") for k in (1, 2, 3, 4)]
    state = torch.load(f"{config.output_dir}/checkpoint-1/training_state.pt", weights_only=True)
    run = build(make_config(tiny_sd, {"output_dir": "unused"}), make_accelerator(config))
    start = {n: p.detach() for n, p in run.unet.named_parameters() if p.requires_grad}
    assert len(state["ema"]["shadow_params"]) == len(start)
    final = weights(config.output_dir)
    for name in final:
        mean = None
        for k, step in enumerate(raw, start=1):
            decay = 0.0 if k == 1 else min(0.9, k / (9 + k))
            mean = step[name] if mean is None else decay * mean + (1 - decay) * step[name]
        torch.testing.assert_close(final[name], mean, rtol=1e-5, atol=1e-7)


def test_clear_output_is_only_for_runs(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.jsonl").write_text("{}")
    clear_output(tmp_path)
    assert (tmp_path / "notes.txt").exists()
    assert not (tmp_path / "metrics.jsonl").exists()
