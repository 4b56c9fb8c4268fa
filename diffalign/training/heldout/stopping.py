"""The end of a run by its held-out pairs: early stopping, and the weights of the best measurement as the final ones.

    output_dir/best/                the weights of the best measurement so far, while the run goes on
    output_dir/checkpoint-N/best/   the same at step N (hard links where the disk has them)

Whether to stop follows from the list of measurements, which is in every checkpoint: a resumed run decides as an
uninterrupted one, and a new patience counts for the measurements there were before. Names and meanings are those of
transformers' EarlyStoppingCallback, except that changes below the threshold add up: a measurement is compared with the
last one that counted as an improvement.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.config.sections import ValidationSection
from diffalign.io.files import remove, written_whole
from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.callbacks.recovery import add_event
from diffalign.training.checkpoints.checkpoint import BEST, NO_ROOM, CheckpointError, tensor_bytes
from diffalign.training.heldout.estimates import PREFIX
from diffalign.training.metrics import HEALTH_FILE
from diffalign.training.trainable import Trainable

log = logging.getLogger(__name__)

Measurement = tuple[int, float]  # step, value of the metric


def improvements(history: Sequence[Measurement], *, lower: bool, threshold: float = 0.0) -> list[int]:
    """The measurements, by place, that are better than the last such one by more than `threshold`; the first is one.

    A value that is not a number never is. lower: whether lower values are better.
    """
    found: list[int] = []
    for place, (_, value) in enumerate(history):
        if math.isnan(value):
            continue
        gain = math.inf if not found else history[found[-1]][1] - value if lower else value - history[found[-1]][1]
        if gain > threshold:
            found.append(place)
    return found


class EarlyStopping(Callback):
    """Ends a run whose held-out metric no longer improves, and makes the best measurement's weights the final ones."""

    def __init__(self, run: Trainable, settings: ValidationSection) -> None:
        self.run, self.settings, self.metric = run, settings, settings.metric_for_best_model
        self.lower = self.metric == "loss"
        self.history: list[Measurement] = []

    @property
    def best(self) -> Measurement | None:
        """The last measurement that was an improvement."""
        return self.history[self.counted[-1]] if self.counted else None

    @property
    def counted(self) -> list[int]:
        """The measurements, by place, that were improvements."""
        return improvements(self.history, lower=self.lower, threshold=self.settings.early_stopping_threshold)

    @property
    def exhausted(self) -> bool:
        """Whether as many measurements as the patience allows brought no improvement."""
        patience = self.settings.early_stopping_patience
        waited = len(self.history) - 1 - self.counted[-1] if self.counted else len(self.history)
        return patience is not None and waited >= patience

    def on_train_begin(self, state: TrainingState) -> None:
        """Ends a run at once that was resumed at the step at which it stopped."""
        state.should_stop |= self.exhausted

    def on_log(self, state: TrainingState) -> None:
        """Adds the step's measurement, if there is one; stores its weights where it is the best, or ends the run."""
        value = state.metrics.get(f"{PREFIX}/{self.metric}")
        if value is None:
            return
        self.history.append((state.step, value))
        if self.settings.load_best_model_at_end and self.best == self.history[-1]:
            save_best(self.run)
        if self.exhausted and not state.should_stop:
            state.should_stop = True
            self._report(state.step)

    def on_stop(self, state: TrainingState) -> None:
        """Loads the best weights, in every process."""
        best = self.best
        if not self.settings.load_best_model_at_end or best is None:
            return
        if self.run.accelerator.is_main_process:
            log.info("the final weights are those of step %d: held-out %s %.4g", best[0], self.metric, best[1])
        if best[0] != state.step:
            load_best(self.run)
            state.weights_of = best[0]

    def on_train_end(self, state: TrainingState) -> None:
        """Removes the folder of the best weights, which are the final ones now."""
        if self.run.accelerator.is_main_process:
            remove(self.run.output_dir / BEST)

    def save_state(self, folder: Path) -> dict[str, Any]:
        """The measurements, and the best weights beside the checkpoint's own."""
        if self.settings.load_best_model_at_end and self.best is not None:
            shutil.copytree(self.run.output_dir / BEST, folder / BEST, copy_function=_link)
        return {"history": [list(measurement) for measurement in self.history]}

    def load_state(self, state: dict[str, Any], folder: Path) -> None:
        """Takes the measurements and the best weights of that time.

        Raises CheckpointError for a checkpoint without the weights of its best measurement.
        """
        self.history = [(int(step), float(value)) for step, value in state.get("history", ())]
        if not self.settings.load_best_model_at_end or self.best is None:
            return
        if not (folder / BEST).is_dir():
            raise CheckpointError(
                f"validation.load_best_model_at_end: {folder} does not contain the weights of its best measurement, "
                f"step {self.best[0]}; resume from another checkpoint, or set it to false"
            )
        if self.run.accelerator.is_main_process:
            with written_whole(self.run.output_dir / BEST) as partial:
                shutil.copytree(folder / BEST, partial, copy_function=_link)
        self.run.accelerator.wait_for_everyone()

    def _report(self, step: int) -> None:
        """Logs why the run ends, and adds it to the events of the run."""
        patience, threshold = self.settings.early_stopping_patience, self.settings.early_stopping_threshold
        by = f" by more than {threshold:g}" if threshold else ""
        best = (
            "no measurement was a finite number"
            if self.best is None
            else "the best is {1:.4g} at step {0}".format(*self.best)
        )
        says = (
            f"early stopping: the held-out {self.metric} has not improved{by} in {patience} measurements; it is "
            f"{self.history[-1][1]:.4g}, and {best}"
        )
        if self.run.accelerator.is_main_process:
            log.info("step %d: %s", step, says)
            event = {"step": step, "rule": "early_stopping", "action": "end", "says": says}
            add_event(self.run.output_dir / HEALTH_FILE, event)


def save_best(run: Trainable) -> None:
    """Writes the weights as they are (the EMA's where there is one) to the folder of the best ones.

    Raises NoSpaceError where the disk is full.
    """
    if run.accelerator.is_main_process:
        needed = tensor_bytes(run.parameters)
        with (
            run.averaged_weights(),
            written_whole(run.output_dir / BEST, needed, "the best weights", NO_ROOM) as partial,
        ):
            partial.mkdir()
            run.save_weights(partial)
    run.accelerator.wait_for_everyone()


def load_best(run: Trainable) -> None:
    """Loads what `save_best` wrote into the trained module, and into the EMA where there is one."""
    run.load_weights(run.output_dir / BEST)
    if run.ema is not None:
        for average, weight in zip(run.ema.shadow_params, run.parameters, strict=True):
            average.data.copy_(weight.data)
    run.accelerator.wait_for_everyone()


def _link(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
