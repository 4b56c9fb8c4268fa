"""Checkpoints every `training.checkpointing_steps`, and when another callback asks for one."""

from __future__ import annotations

from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.checkpoints.run_state import save_run


class Checkpoints(Callback):
    """Writes `checkpoint-N` and calls `on_checkpoint`."""

    def __init__(self, every: int | None) -> None:
        """None: only when asked."""
        self.every = every

    def on_step_end(self, state: TrainingState) -> None:
        """Writes one where it is due."""
        if state.should_save or (self.every is not None and state.step % self.every == 0):
            state.should_save = False
            state.call("on_checkpoint", save_run(state.run, state.step))
