"""Checkpoints that are completed beside the next steps: the same files, hidden until then, none lost in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import torch

from diffalign import Callback
from diffalign.config.schema import Config
from diffalign.io.manifest import read_manifest
from diffalign.training.callbacks.base import TrainingState
from diffalign.training.checkpoints.background import Background
from diffalign.training.checkpoints.checkpoint import Checkpoint, checkpoints, damage, save_checkpoint, source_states
from diffalign.training.run import run_training


def test_one_that_is_not_finished_is_hidden_and_the_one_before_it_stays(tmp_path: Path) -> None:
    later: list[Callable[[], None]] = []
    for step in (1, 2):
        content = Checkpoint(
            step, lambda f: (f / "weights").write_text("x"), {"x": torch.ones(2)}, {"round": step, "carried": []}
        )
        save_checkpoint(tmp_path, content, 1, later.append)
    assert checkpoints(tmp_path) == []
    later.pop(0)()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
    assert sorted(state["round"] for state in source_states(tmp_path)) == [1, 2]  # both need the files of their round
    later.pop(0)()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert damage(tmp_path / "checkpoint-2") is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("moment", ["before it is read", "after the others were listed"])
def test_one_that_another_thread_finishes_meanwhile_is_seen(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later: list[Callable[[], None]] = []
    content = Checkpoint(
        1, lambda f: (f / "weights").write_text("x"), {"x": torch.ones(2)}, {"round": 1, "carried": []}
    )
    save_checkpoint(tmp_path, content, 1, later.append)
    read_text = Path.read_text

    def read(file: Path) -> str:
        if later:
            later.pop()()
        return read_text(file)

    def listed(folder: Path) -> list[Path]:
        found = checkpoints(folder)
        if later:
            later.pop()()
        return found

    if moment == "before it is read":
        monkeypatch.setattr(Path, "read_text", read)
    else:
        monkeypatch.setattr("diffalign.training.checkpoints.checkpoint.checkpoints", listed)
    assert [state["round"] for state in source_states(tmp_path)] == [1]
    assert later == []


def test_an_error_is_raised_once_and_where_it_is_waited_for() -> None:
    background = Background()
    background.begin(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        background.wait()
    background.wait()


class Fails(Callback):
    """Ends the run by an error while a piece of work of the background is not done, and notes what `close` finds."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.closed, self.found = error, Event(), list[str]()

    def on_step_end(self, state: TrainingState) -> None:
        state.run.background.begin(self.work)
        raise RuntimeError("the run's own error")

    def work(self) -> None:
        self.closed.wait(0.5)  # in vain, where the run waits
        self.found.append("done")
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.found.append("closed")
        self.closed.set()


@pytest.mark.parametrize("error", [None, OSError(28, "No space left on device", "/out/checkpoint-2")])
def test_a_run_that_fails_waits_for_it(
    error: Exception | None,
    make_config: Callable[..., Config],
    tiny_sd: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fails = Fails(error)
    with pytest.raises(RuntimeError, match="the run's own error"):
        run_training(make_config(tiny_sd, {"training.async_checkpoints": True}), callbacks=[fails])
    assert fails.found == ["done", "closed"]
    assert ("/out/checkpoint-2: no space is left" in caplog.text) == (error is not None)


class Complete(Callback):
    """Notes the folders that it is told of, which must be complete then."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_checkpoint(self, state: TrainingState, folder: Path) -> None:
        assert damage(folder) is None
        self.found.append(folder.name)


def test_a_run_writes_the_same_files(make_config: Callable[..., Config], tiny_sd: Path, tmp_path: Path) -> None:
    written = []
    for later in (False, True):
        out, told = tmp_path / str(later), Complete()
        changes = {"training.checkpointing_steps": 2, "training.ema_decay": 0.5, "training.async_checkpoints": later}
        run_training(make_config(tiny_sd, {**changes, "output_dir": str(out)}), callbacks=[told])
        assert told.found == ["checkpoint-2", "checkpoint-4"]
        manifests = [read_manifest(folder) for folder in (out / "checkpoint-2", out / "checkpoint-4", out)]
        for manifest in manifests:
            assert isinstance(manifest, dict)
            manifest["files"].pop("config.yaml", None)  # the setting itself, and the folder
        written.append(manifests)
    assert written[0] == written[1]
