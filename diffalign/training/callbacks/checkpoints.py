"""Checkpoints every `training.checkpointing_steps`, and when another callback asks for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.training.callbacks.base import Callback, TrainingState, named
from diffalign.training.checkpoints.run_state import finish_saving, save_run
from diffalign.training.distributed.vital_signs import long_work


class Checkpoints(Callback):
    """Writes `checkpoint-N` and calls `on_checkpoint` once it is complete."""

    def __init__(self, every: int | None) -> None:
        """None: only when asked."""
        self.every = every
        self.unfinished: Path | None = None  # the last one, where it is finished beside the steps

    def on_step_end(self, state: TrainingState) -> None:
        """Writes one where it is due. One that another callback asked for is complete before the next step."""
        asked = state.should_save
        if asked or (self.every is not None and state.step % self.every == 0):
            self._finish(state)
            if state.return_to is not None:  # a callback's answer to it
                return
            state.should_save = False
            with long_work("writing a checkpoint"):
                self.unfinished = save_run(state.run, state.step, lambda folder: _states(state, folder))
            if asked or not state.run.config.training.async_checkpoints:
                self._finish(state)

    def on_stop(self, state: TrainingState) -> None:
        """Finishes the last one."""
        self._finish(state)

    def _finish(self, state: TrainingState) -> None:
        folder, self.unfinished = self.unfinished, None
        if folder is not None:
            with long_work("writing a checkpoint"):
                finish_saving(state.run)
            state.call("on_checkpoint", folder)


def _states(state: TrainingState, folder: Path) -> dict[str, dict[str, Any]]:
    """What each callback needs to continue, by its name; nothing of those that need nothing."""
    found = {name: callback.save_state(folder) for name, callback in named(state.callbacks)}
    return {name: values for name, values in found.items() if values}
