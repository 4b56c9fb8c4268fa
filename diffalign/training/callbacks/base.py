"""What a callback is, and the state of the loop that it reads and may change.

    from diffalign import Callback, Trainer

    class Patience(Callback):
        def on_log(self, state):
            if state.metrics["loss"] < 0.1:
                state.should_stop = True                # this step is the last: final weights follow

    Trainer(..., callbacks=[Patience()])

Every process calls every callback in the order of the list; what only one process should do stands under
`state.run.accelerator.is_main_process`. Processes must agree on `should_stop` and `should_save`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError
from diffalign.training.metrics import Meter
from diffalign.training.trainable import Trainable


@dataclass
class TrainingState:
    """Where the loop is."""

    run: Trainable
    callbacks: Sequence[Callback]
    step: int  # optimiser steps taken
    should_stop: bool = False  # after this step
    should_save: bool = False  # write a checkpoint after this step
    metrics: dict[str, float] = field(default_factory=dict)  # means of the last log
    meter: Meter = field(default_factory=Meter)  # sums since the last log
    return_to: Path | None = None  # an earlier checkpoint to continue from
    weights_of: int | None = None  # the step whose weights are the final ones; None: the last

    def begin(self) -> None:
        """Gives the callbacks their states from the checkpoint that the run was restored from, if any, and starts."""
        if self.run.restored_from is not None:
            for name, callback in named(self.callbacks):
                callback.load_state(self.run.callback_states.get(name, {}), self.run.restored_from)
        self.call("on_train_begin")

    def call(self, event: str, *details: Any) -> None:
        """Calls the method `event` of each callback in turn; those after one that sets `return_to` are left out."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *details)
            if self.return_to is not None:
                return


class Callback:
    """Does nothing. A callback of your own inherits from it and defines the methods that it needs."""

    def on_train_begin(self, state: TrainingState) -> None:
        """Called before the first step, and again after a return to an earlier checkpoint."""

    def on_step_end(self, state: TrainingState) -> None:
        """Called after every optimiser step, before that step's log and checkpoint."""

    def on_log(self, state: TrainingState) -> None:
        """Called with new `state.metrics` before they are written; what is added to them is written too."""

    def on_checkpoint(self, state: TrainingState, folder: Path) -> None:
        """Called once a checkpoint is written to `folder`."""

    def on_stop(self, state: TrainingState) -> None:
        """Called after the last step, before the final weights are written."""

    def on_train_end(self, state: TrainingState) -> None:
        """Called once the final weights are written."""

    def close(self) -> None:
        """Called when the run ends, also by an error."""

    def save_state(self, folder: Path) -> dict[str, Any]:
        """What this callback needs to continue, as plain values for a checkpoint; files may go into its folder.

        Only the main process calls it.
        """
        return {}

    def load_state(self, state: dict[str, Any], folder: Path) -> None:
        """Called in every process before `on_train_begin` with what `save_state` gave, after resuming from `folder`.

        Empty where the checkpoint has none.
        """


def named(callbacks: Sequence[Callback]) -> list[tuple[str, Callback]]:
    """Callbacks with names that are the same in a resumed run: the class, and a number from the second of it on."""
    found: list[tuple[str, Callback]] = []
    seen: Counter[str] = Counter()
    for callback in callbacks:
        name = f"{type(callback).__module__}.{type(callback).__qualname__}"
        seen[name] += 1
        found.append((name if seen[name] == 1 else f"{name}#{seen[name]}", callback))
    return found


def check_callbacks(callbacks: Sequence[Callback]) -> list[Callback]:
    """The callbacks as a list. Raises DiffalignError for one that is no instance of Callback."""
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise DiffalignError(
                f"callbacks: {callback!r} is not an instance of diffalign.Callback; let its class inherit from that, "
                "and pass an instance"
            )
    return [*callbacks]
