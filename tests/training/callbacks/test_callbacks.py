"""Custom callbacks in a run: their arguments, their order, and what they may change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign import Callback, DiffalignError, Trainer, TrainingArguments, TrainingState, load_pairs
from diffalign.io.progress import Progress
from diffalign.training.trainable import TrainingError
from diffalign.world import base_path, pairs_path

LORA = "pytorch_lora_weights.safetensors"


class Recorder(Callback):
    """Notes every event with its step, and which files there were."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_train_begin(self, state: TrainingState) -> None:
        self.events.append(("begin", state.step))

    def on_step_end(self, state: TrainingState) -> None:
        self.events.append(("step", state.step))

    def on_log(self, state: TrainingState) -> None:
        self.events.append(("log", state.step, state.metrics["loss"]))
        state.metrics["mine"] = 2.0 * state.step

    def on_checkpoint(self, state: TrainingState, folder: Path) -> None:
        assert (folder / "manifest.json").is_file()
        self.events.append(("checkpoint", state.step, folder.name))

    def on_train_end(self, state: TrainingState) -> None:
        assert (state.run.output_dir / LORA).is_file()
        self.events.append(("end", state.step))

    def close(self) -> None:
        self.events.append(("close",))


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    """Four steps of two pairs of the world."""
    arguments = {"max_train_steps": 4, "train_batch_size": 2, "logging_steps": 2, "report_to": "none", **settings}
    return Trainer(
        base_path(),
        "dpo",
        load_pairs(pairs_path(), resolution=16, max_pairs=4),
        TrainingArguments(output_dir=str(folder), **arguments),
        callbacks=callbacks,
        validation={"prompts": ["a red circle on a blue background"], "every": 3, "num_inference_steps": 1},
    )


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_callback_is_called_with_steps_metrics_and_files(tmp_path: Path) -> None:
    recorder = Recorder()
    last = trainer(tmp_path, recorder, checkpointing_steps=3).train()
    first_loss, second_loss = (line["loss"] for line in lines(tmp_path))
    assert recorder.events == [
        ("begin", 0),
        ("step", 1),
        ("step", 2),
        ("log", 2, first_loss),
        ("step", 3),
        ("checkpoint", 3, "checkpoint-3"),
        ("step", 4),
        ("log", 4, second_loss),
        ("end", 4),
        ("close",),
    ]
    assert [line["mine"] for line in lines(tmp_path)] == [4.0, 8.0]
    assert last["mine"] == 8.0


def test_validation_images_come_from_a_python_run_also_of_a_step_that_it_was_stopped_at(tmp_path: Path) -> None:
    trainer(tmp_path, checkpointing_steps=3).train()
    images = {p.name: p.read_bytes() for p in (tmp_path / "validation").iterdir()}
    assert images.keys() == {"step-000003.png", "step-000004.png"}
    (tmp_path / "validation/step-000003.png").unlink()  # as if stopped once the checkpoint of step 3 was written
    trainer(tmp_path, checkpointing_steps=3, resume_from_checkpoint="latest").train()
    assert {p.name: p.read_bytes() for p in (tmp_path / "validation").iterdir()} == images


@pytest.mark.parametrize("event", ["on_step_end", "on_log"])
def test_a_callback_may_end_the_run(event: str, tmp_path: Path) -> None:
    """The step is logged, and the final weights and images are written, as at the last step."""

    class Enough(Callback):
        def stop(self, state: TrainingState) -> None:
            state.should_stop = state.step == 2

    setattr(Enough, event, Enough.stop)
    trainer(tmp_path, Enough()).train()
    assert [line["step"] for line in lines(tmp_path)] == [2]
    assert (tmp_path / LORA).is_file()
    assert [p.name for p in (tmp_path / "validation").iterdir()] == ["step-000002.png"]


def test_a_callback_may_end_the_run_before_its_first_step(tmp_path: Path) -> None:
    class Never(Callback):
        def on_train_begin(self, state: TrainingState) -> None:
            state.should_stop = True

    recorder = Recorder()
    assert trainer(tmp_path, Never(), recorder).train() == {}
    assert recorder.events == [("begin", 0), ("end", 0), ("close",)]


@pytest.mark.parametrize(("every", "logged"), [(10, [3]), (2, [2, 3]), (3, [3])])
def test_the_step_of_a_checkpoint_that_ends_the_run_is_logged(every: int, logged: list[int], tmp_path: Path) -> None:
    class Enough(Callback):
        def on_checkpoint(self, state: TrainingState, folder: Path) -> None:
            state.should_stop = True

    last = trainer(tmp_path, Enough(), checkpointing_steps=3, logging_steps=every).train()
    assert [line["step"] for line in lines(tmp_path)] == logged
    assert last == {name: value for name, value in lines(tmp_path)[-1].items() if name != "step"}
    assert (tmp_path / LORA).is_file()


def test_the_bar_shows_the_step_that_its_log_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(Progress, "display", lambda self, *_: drawn.append((self.n, "loss=" in str(self))))
    trainer(tmp_path).train()
    assert [n for n, loss in drawn if loss] == [2, 4]


def test_a_callback_may_ask_for_a_checkpoint(tmp_path: Path) -> None:
    class Save(Callback):
        def on_step_end(self, state: TrainingState) -> None:
            state.should_save = state.step == 3

    trainer(tmp_path, Save()).train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("wrong", [Recorder, print])
def test_what_is_no_callback_is_refused_before_anything_is_loaded(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"callbacks: .* is not an instance of diffalign.Callback.*an instance"):
        trainer(tmp_path / "run", wrong)
    assert not (tmp_path / "run").exists()


def test_an_error_of_a_callback_ends_the_run_and_closes_all(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_step_end(self, state: TrainingState) -> None:
            raise TrainingError("enough")

    recorder = Recorder()
    with pytest.raises(TrainingError, match="enough"):
        trainer(tmp_path, recorder, Fails()).train()
    assert recorder.events == [("begin", 0), ("step", 1), ("close",)]
    assert not (tmp_path / LORA).exists()
