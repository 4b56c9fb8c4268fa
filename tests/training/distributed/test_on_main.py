"""What the main process decides holds in all processes, and where it fails none waits for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffalign.config.health_section import HealthSection
from diffalign.config.schema import Config
from diffalign.errors import DiffalignError
from diffalign.training.callbacks.health import Finding
from diffalign.training.callbacks.recovery import Health
from diffalign.training.checkpoints import run_state
from diffalign.training.checkpoints.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from diffalign.training.processes import on_main
from tests.training.distributed.group import in_two


def fails(error: Exception) -> Callable[[], None]:
    def do() -> None:
        raise error

    return do


def work(accelerator: Any, folder: Path, config: Config) -> None:
    assert on_main(accelerator, lambda: accelerator.process_index) == 0

    with pytest.raises(CheckpointError, match="damaged"):
        on_main(accelerator, fails(CheckpointError("damaged")))
    for error, said in (
        (OSError(30, "Read-only file system", "/out"), "/out: the file system is read-only"),
        (KeyError("a"), "the main process ended: KeyError: 'a'"),
    ):
        with pytest.raises(type(error) if accelerator.is_main_process else DiffalignError) as raised:
            on_main(accelerator, fails(error))
        assert accelerator.is_main_process or said in str(raised.value)

    own = folder / f"of-{accelerator.process_index}"  # each has another listing, as of a network file system
    for step in (2, 4) if accelerator.is_main_process else (2, 3):
        save_checkpoint(own, Checkpoint(step, lambda f: (f / "weights").write_text("x"), {"x": torch.ones(2)}))
    run: Any = SimpleNamespace(accelerator=accelerator, output_dir=own, config=config)
    run_state.restore = lambda run, chosen: int(chosen.name.partition("-")[2])  # type: ignore[assignment]
    assert run_state.resume(run) == 4
    health = Health(run, HealthSection(action="roll_back"))
    assert (
        health._act(5, {"loss": 1.0}, Finding("saturation", "saturated", 3, True)) == folder / "of-0" / "checkpoint-2"
    )


def test_processes_agree(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config(tmp_path, {"training.resume_from_checkpoint": "latest"})
    for status, said in in_two(lambda accelerator, folder: work(accelerator, folder, config), tmp_path):
        assert status == 0, said
