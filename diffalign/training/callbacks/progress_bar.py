"""A progress bar with the last logged loss, accuracy and learning rate."""

from __future__ import annotations

from typing import Any

from diffalign.io.progress import Progress
from diffalign.training.callbacks.base import Callback, TrainingState

SHOWN = {"loss": "loss", "implicit_acc": "acc", "accuracy": "acc", "lr": "lr", "skipped_steps": "skipped"}
FORMATS = {"loss": ".4g", "acc": ".2f", "lr": ".1e", "skipped": ".0%"}


class ProgressBar(Callback):
    """One bar for the whole run, in the first process of each machine."""

    bar: Any = None

    def on_train_begin(self, state: TrainingState) -> None:
        """Makes the bar, or sets it back."""
        if self.bar is None:
            self.bar = Progress(
                total=state.run.config.training.max_train_steps,
                initial=state.step,
                desc=state.run.label,
                unit=" steps",
                disable=not state.run.accelerator.is_local_main_process,
            )
        self.bar.n = state.step

    def on_step_end(self, state: TrainingState) -> None:
        """Moves to the step, unless its log has moved there."""
        self.bar.update(state.step - self.bar.n)

    def on_log(self, state: TrainingState) -> None:
        """Shows what there is: fp16 may have skipped all steps since the last log, which leaves no learning rate."""
        there = {short: state.metrics[name] for name, short in SHOWN.items() if name in state.metrics}
        if not there.get("skipped"):
            there.pop("skipped", None)
        self.bar.n = state.step  # a log comes before this callback's own `on_step_end`
        self.bar.set_postfix({short: format(value, FORMATS[short]) for short, value in there.items()})

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self.bar is not None:
            self.bar.close()
