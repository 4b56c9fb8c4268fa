"""The training loop: steps until the run is at its end, with callbacks between them, then the final weights.

What one step does is in `training/step.py`; what happens between two steps is in `training/callbacks/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.checkpoints.run_state import restore, save_final
from diffalign.training.distributed.vital_signs import long_work
from diffalign.training.trainable import Trainable


def train(run: Trainable, start: int = 0, callbacks: Sequence[Callback] = ()) -> dict[str, float]:
    """Takes the remaining optimiser steps of a run that stands at step `start`, and returns the last logged metrics.

    A run that was killed between its last checkpoint and its final weights takes no step and writes the latter.
    Raises TrainingError for weights that are not finite, and what the callbacks raise.
    """
    state, steps = TrainingState(run, callbacks, start), run.config.training.max_train_steps
    with ExitStack() as stack:
        for callback in callbacks:
            stack.callback(callback.close)
        stack.callback(_end_background, run)  # first of all: `close` finds the last checkpoint complete
        state.begin()
        batches = run.source.batches(state.step)
        state.should_stop |= state.step == steps  # a callback may have set it
        while not state.should_stop:
            run.step(batches, state.meter)
            state.meter.add(run.source.take_metrics())
            state.step += 1
            state.should_stop = state.step == steps
            state.call("on_step_end")
            if state.return_to is not None:
                run.accelerator.wait_for_everyone()
                state = TrainingState(run, callbacks, restore(run, state.return_to), metrics=state.metrics)
                state.begin()
                batches = run.source.batches(state.step)
        state.call("on_stop")
        with long_work("writing the final weights"):
            save_final(run, state.step if state.weights_of is None else state.weights_of)
        state.call("on_train_end")
    return state.metrics


def _end_background(run: Trainable) -> None:
    with long_work("writing a checkpoint"):
        run.background.end()
