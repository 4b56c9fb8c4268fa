"""Checkpoints are complete or absent, found by name, and ordered by number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.training.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoints,
    find_checkpoint,
    load_training_state,
    save_checkpoint,
)


def save(folder: Path, step: int, limit: int | None = None) -> Path:
    return save_checkpoint(
        folder, Checkpoint(step, lambda f: (f / "weights").write_text(str(step)), {"x": torch.ones(2)}), limit
    )


def test_round_trip_and_numeric_order(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save(tmp_path, step)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    state = load_training_state(tmp_path / "checkpoint-9")
    assert state["step"] == 9
    assert torch.equal(state["x"], torch.ones(2))


def test_a_killed_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def killed(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, Checkpoint(2, killed, {}))
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-1"]
    save(tmp_path, 2)
    assert not (tmp_path / "checkpoint-2/half").exists()


def test_the_limit_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 12):
        save(tmp_path, step, limit=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-12"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1/stale").write_text("")
    save(tmp_path, 1)
    assert not (tmp_path / "checkpoint-1/stale").exists()


def test_finding(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "latest") is None
    save(tmp_path, 4)
    assert find_checkpoint(tmp_path, "checkpoint-4") == tmp_path / "checkpoint-4"
    assert find_checkpoint(tmp_path / "elsewhere", str(tmp_path / "checkpoint-4")) == tmp_path / "checkpoint-4"
    with pytest.raises(CheckpointError, match="this run has: checkpoint-4"):
        find_checkpoint(tmp_path, "checkpoint-5")


def test_state_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (print, ("ran",))

    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    torch.save({"step": 1, "x": Evil()}, folder / "training_state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_training_state(folder)
