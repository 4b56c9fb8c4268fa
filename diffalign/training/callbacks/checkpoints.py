"""Checkpoints every `training.checkpointing_steps`, and when another callback asks for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.training.callbacks.base import Callback, TrainingState, named
from diffalign.training.checkpoints.run_state import save_run
from diffalign.training.distributed.vital_signs import long_work


class Checkpoints(Callback):
    """Writes `checkpoint-N` and calls `on_checkpoint`."""

    def __init__(self, every: int | None) -> None:
        """None: only when asked."""
        self.every = every

    def on_step_end(self, state: TrainingState) -> None:
        """Writes one where it is due."""
        if state.should_save or (self.every is not None and state.step % self.every == 0):
            state.should_save = False
            with long_work("writing a checkpoint"):
                folder = save_run(state.run, state.step, lambda folder: _states(state, folder))
            state.call("on_checkpoint", folder)


def _states(state: TrainingState, folder: Path) -> dict[str, dict[str, Any]]:
    """What each callback needs to continue, by its name; nothing of those that need nothing."""
    found = {name: callback.save_state(folder) for name, callback in named(state.callbacks)}
    return {name: values for name, values in found.items() if values}
