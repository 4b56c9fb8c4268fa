"""What a run does when a health rule reports: it warns, stops with a message, or goes back to a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import diffalign.training.callbacks.health as health
from diffalign.config.schema import Config, ConfigError
from diffalign.training.build import build
from diffalign.training.callbacks.health_rules import Limits, Lines, Rule
from diffalign.training.checkpoints.run_state import restore, save_final
from diffalign.training.metrics import Meter
from diffalign.training.optim.optimizers import set_rates
from diffalign.training.processes import make_accelerator
from diffalign.training.run import run_training
from diffalign.training.step import optimizer_step
from diffalign.training.trainable import TrainingError
from tests.training.test_run import metrics, same, weights

MakeConfig = Callable[..., Config]
LR = 1e-3
EIGHT_STEPS = {
    "training.max_train_steps": 8,
    "training.checkpointing_steps": 2,
    "training.learning_rate": LR,
    "health.window": 2,
    "training.lr_scheduler": "constant",
}


def events(folder: str | Path) -> list[dict]:
    path = Path(folder) / "health.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def too_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the rules, one that finds every learning rate above .6e-3 too high from step 6 on: pure, and sure."""

    def bad(lines: Lines, _: Limits) -> bool:
        return lines[-1]["step"] >= 6 and lines[-1]["lr"] > 0.6e-3

    rule = Rule(needs=("lr",), bad=bad, report="too fast: lower it", lower_lr=True)
    monkeypatch.setattr(health, "RULES", {"too_fast": rule})


def by_hand(config: Config, checkpoint: Path, steps: int, lr: float) -> dict[str, torch.Tensor]:
    """The weights after so many steps from a checkpoint at a learning rate that is simply put into the optimiser."""
    run = build(config, make_accelerator(config))
    start = restore(run, checkpoint)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.lr_scheduler.base_lrs = [lr]
    batches = run.source.batches(start)
    for _ in range(steps):
        optimizer_step(run, batches, Meter())
    save_final(run, start + steps)
    return weights(config.output_dir)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.usefixtures("too_fast")
def test_a_roll_back_is_the_checkpoint_with_half_the_learning_rate(
    method: str, make_config: MakeConfig, tiny_sd: Path, tmp_path: Path
) -> None:
    """To the bit what four steps by hand from checkpoint-4 give; nothing of steps 5 and 6 is left in the weights."""
    settings = {**EIGHT_STEPS, "tuning.method": method, "health.action": "roll_back", "training.ema_decay": 0.9}
    config = make_config(tiny_sd, settings)
    run_training(config)
    rolled = weights(config.output_dir)
    assert [line["step"] for line in metrics(config.output_dir)] == list(range(1, 9))
    assert [line["lr"] for line in metrics(config.output_dir)] == [LR] * 4 + [LR / 2] * 4
    assert [line.get("roll_backs") for line in metrics(config.output_dir)] == [None] * 4 + [1.0] * 4
    (event,) = events(config.output_dir)
    told = {name: event[name] for name in ("step", "at", "rule", "action", "lr_factor")}
    assert told == {"step": 4, "at": 6, "rule": "too_fast", "action": "roll_back", "lr_factor": 0.5}
    assert event["metrics"]["lr"] == LR

    other = make_config(tiny_sd, {**settings, "output_dir": str(tmp_path / "hand")})
    assert same(rolled, by_hand(other, Path(config.output_dir) / "checkpoint-4", 4, LR / 2))
    straight = make_config(tiny_sd, {**settings, "health.action": "none", "output_dir": str(tmp_path / "straight")})
    run_training(straight)
    assert not same(rolled, weights(straight.output_dir))
    assert same(weights(Path(config.output_dir) / "checkpoint-4"), weights(tmp_path / "straight/checkpoint-4"))


@pytest.mark.parametrize("killed_after", [4, 6])
@pytest.mark.usefixtures("too_fast")
def test_a_resumed_run_that_went_back_is_the_uninterrupted_one(
    killed_after: int, make_config: MakeConfig, tiny_sd: Path, tmp_path: Path
) -> None:
    """Killed right after the roll back to step 4, and two steps later: the lower rate is in force again."""
    settings = {**EIGHT_STEPS, "health.action": "roll_back", "training.lr_scheduler": "cosine"}
    settings["training.lr_warmup_steps"] = 1
    settings["training.learning_rate"] = LR * 3  # a cosine is still high enough at step 6
    config = make_config(tiny_sd, settings)
    run_training(config)
    whole = weights(config.output_dir)
    assert any(event["action"] == "roll_back" for event in events(config.output_dir))
    lines = metrics(config.output_dir)
    for step in (6, 8):
        if step > killed_after:
            shutil.rmtree(Path(config.output_dir) / f"checkpoint-{step}")
    (Path(config.output_dir) / "pytorch_lora_weights.safetensors").unlink()
    run_training(make_config(tiny_sd, {**settings, "training.resume_from_checkpoint": "latest"}))
    assert same(whole, weights(config.output_dir))
    assert metrics(config.output_dir) == lines


@pytest.mark.usefixtures("too_fast")
def test_going_back_further_than_a_roll_back_forgets_it(make_config: MakeConfig, tiny_sd: Path) -> None:
    config = make_config(tiny_sd, {**EIGHT_STEPS, "health.action": "roll_back"})
    run_training(config)
    again = {**EIGHT_STEPS, "health.action": "warn", "training.resume_from_checkpoint": "checkpoint-2"}
    run_training(make_config(tiny_sd, again))
    assert [line["lr"] for line in metrics(config.output_dir)] == [LR] * 8
    assert [event["action"] for event in events(config.output_dir)] == ["warn"]


@pytest.mark.usefixtures("too_fast")
def test_roll_backs_are_bounded(make_config: MakeConfig, tiny_sd: Path) -> None:
    settings = {**EIGHT_STEPS, "health.action": "roll_back", "training.learning_rate": 100 * LR}
    config = make_config(tiny_sd, {**settings, "health.max_roll_backs": 3})
    with pytest.raises(TrainingError, match=r"stopped at step 6 after 3 roll backs .*: too fast.*checkpoint-4 is the"):
        run_training(config)
    assert [event["action"] for event in events(config.output_dir)] == ["roll_back"] * 3 + ["stop"]
    assert [event.get("lr_factor") for event in events(config.output_dir)] == [0.5, 0.25, 0.125, None]


@pytest.mark.usefixtures("too_fast")
def test_a_stop_says_what_is_wrong_and_where_to_go_on(make_config: MakeConfig, tiny_sd: Path) -> None:
    config = make_config(tiny_sd, {**EIGHT_STEPS, "health.action": "stop"})
    with pytest.raises(TrainingError, match=r"stopped at step 6 by health.action: stop: too fast.*checkpoint-4"):
        run_training(config)
    assert {p.name for p in Path(config.output_dir).glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert not (Path(config.output_dir) / "pytorch_lora_weights.safetensors").exists()
    resumed = {**EIGHT_STEPS, "training.resume_from_checkpoint": "latest"}
    with pytest.raises(TrainingError, match="stopped at step 6"):  # nothing has changed
        run_training(make_config(tiny_sd, {**resumed, "health.action": "stop"}))
    run_training(make_config(tiny_sd, {**resumed, "health.action": "none"}))
    assert metrics(config.output_dir)[-1]["step"] == 8


@pytest.mark.usefixtures("too_fast")
def test_without_a_checkpoint_from_before_there_is_nothing_to_go_back_to(
    make_config: MakeConfig, tiny_sd: Path
) -> None:
    settings = {**EIGHT_STEPS, "health.action": "roll_back", "health.window": 7}
    with pytest.raises(TrainingError, match="there is no checkpoint from before it"):
        run_training(make_config(tiny_sd, settings))


@pytest.mark.usefixtures("too_fast")
def test_watching_changes_no_weight(make_config: MakeConfig, tiny_sd: Path, tmp_path: Path) -> None:
    for action in ("none", "warn"):
        run_training(
            make_config(tiny_sd, {**EIGHT_STEPS, "health.action": action, "output_dir": str(tmp_path / action)})
        )
    assert same(weights(tmp_path / "none"), weights(tmp_path / "warn"))
    assert events(tmp_path / "none") == []
    assert len(events(tmp_path / "warn")) == 1


def test_a_loss_that_is_no_number_goes_back_as_well(
    make_config: MakeConfig, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient poisoned once, at the fifth step taken: the run goes back and comes to its end with finite weights."""
    taken, clip = 0, torch.nn.utils.clip_grad_norm_

    def poisoned(parameters: list[torch.nn.Parameter], limit: float, **how: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == 5:
            parameters[0].grad.fill_(torch.nan)
        return clip(parameters, limit, **how)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    config = make_config(tiny_sd, {**EIGHT_STEPS, "health.action": "roll_back"})
    run_training(config)
    assert [(e["rule"], e["step"], e["at"]) for e in events(config.output_dir)] == [("not_finite", 4, 5)]
    assert all(bool(w.isfinite().all()) for w in weights(config.output_dir).values())


def test_settings_that_could_not_go_back_are_refused(make_config: MakeConfig, tiny_sd: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs training\.checkpointing_steps, a multiple"):
        make_config(tiny_sd, {"health.action": "roll_back"})
    with pytest.raises(ConfigError, match=r"needs training\.checkpointing_steps, a multiple"):
        make_config(
            tiny_sd,
            {"health.action": "roll_back", "training.logging_steps": 4, "training.checkpointing_steps": 2},
        )


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_lowered_rate_is_the_schedule_times_the_factor(schedule: str, make_config: MakeConfig, tiny_sd: Path) -> None:
    config = make_config(tiny_sd, {"training.lr_scheduler": schedule, "training.max_train_steps": 6})
    plain, lowered = (build(config, make_accelerator(config)) for _ in range(2))
    for step in range(6):
        if step == 2:
            set_rates(lowered.optimizer, lowered.lr_scheduler, [lowered.lr * 0.25])
        a, b = plain.lr_scheduler.get_last_lr()[0], lowered.lr_scheduler.get_last_lr()[0]
        assert b == pytest.approx(a * (0.25 if step >= 2 else 1), rel=1e-12)
        assert lowered.optimizer.param_groups[0]["lr"] == b
        for run in (plain, lowered):
            run.optimizer.step()
            run.lr_scheduler.step()
