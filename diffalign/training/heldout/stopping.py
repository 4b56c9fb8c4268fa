"""The end of a run by its held-out pairs: early stopping, and the weights of the best measurement as the final ones.

    output_dir/best/                the weights of the best measurement so far, while the run goes on
    output_dir/checkpoint-N/best/   the same at step N (hard links where the disk has them)

A measurement is compared with the last improvement, pair by pair. All are made at the same points, so the difference
has much less variance than the two values. It is an improvement where the one-sided interval of the mean difference,
which counts prompts, is on the better side of 0, and the difference is above the threshold. Otherwise noise alone would
give a new best value every few measurements, and a run that has stopped learning would go on. Changes too small to be
sure of add up.

With `on_plateau: continue` a plateau is no failure: only measurements that are worse than the best one by more than
chance count against the patience.

The final weights are those with the best value, improvement or not, as in transformers; with `plateau_weights: latest`
the latest ones that are not worse than that by more than chance. A model may go on moving in a direction that it has
learned, which changes its images and not the ranking of pairs.

With a least diversity or faithfulness a run ends where its images are below it, and such weights are never the final
ones (`guards.py`).

The list of measurements is in every checkpoint: a resumed run decides as an uninterrupted one, and a new patience
counts for the measurements there were before.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.config.sections import ValidationSection
from diffalign.evaluation.stats import Bootstrap, clustered_mean
from diffalign.io.files import remove, written_whole
from diffalign.models.policy.sharding import parts
from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.callbacks.recovery import add_event
from diffalign.training.checkpoints.checkpoint import BEST, NO_ROOM, CheckpointError, tensor_bytes
from diffalign.training.heldout.callback import HeldOut
from diffalign.training.heldout.estimates import LOSS, PREFIX
from diffalign.training.heldout.guards import Guards
from diffalign.training.metrics import HEALTH_FILE
from diffalign.training.trainable import Trainable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A measurement in the list that decides."""

    step: int
    value: float  # of the metric
    improved: bool  # better than the last improvement by more than chance
    good: bool  # not worse than the best by more than chance
    within: bool = True  # the images are within the limits of `guards.py`, or not measured


@dataclass(frozen=True)
class Rule:
    """When a measurement is an improvement over an earlier one."""

    lower: bool  # whether lower values are better
    threshold: float = 0.0  # the difference must be larger
    confidence: float | None = 0.95  # that it is not chance; None: any difference above the threshold counts

    def improves(self, before: Mapping[int, float], now: Mapping[int, float], prompts: Sequence[str]) -> bool:
        """Whether `now` is better; both are values of pairs by index, and those that both have are compared.

        prompts: of all pairs, by index. With pairs of one prompt alone, which give no interval, any difference counts.
        """
        common = sorted(before.keys() & now.keys())
        if not common:
            return False
        gains = np.array([before[pair] - now[pair] if self.lower else now[pair] - before[pair] for pair in common])
        if not gains.mean() > self.threshold:
            return False
        if self.confidence is None:
            return True
        one_sided = Bootstrap(level=2 * self.confidence - 1)  # its lower end is that of the one-sided interval
        return not clustered_mean(gains, [prompts[pair] for pair in common], bootstrap=one_sided).low <= 0


class EarlyStopping(Callback):
    """Ends a run whose held-out metric no longer improves, and makes the best measurement's weights the final ones."""

    def __init__(
        self, run: Trainable, settings: ValidationSection, heldout: HeldOut, guards: Guards | None = None
    ) -> None:
        self.run, self.settings, self.heldout, self.guards = run, settings, heldout, guards
        self.metric = f"{PREFIX}/{settings.metric_for_best_model}"
        self.rule = Rule(self.metric == LOSS, settings.early_stopping_threshold, settings.early_stopping_confidence)
        self.history: list[Entry] = []
        self.improvement: dict[int, float] = {}  # the pairs' values at the last improvement
        self.top: dict[int, float] = {}  # the pairs' values at the measurement with the best value

    @property
    def best(self) -> Entry | None:
        """The measurement whose weights are to be the final ones, if there is one yet."""
        entries = [entry for entry in self.history if entry.within and math.isfinite(entry.value)]
        if self.settings.plateau_weights == "latest":
            return next((entry for entry in reversed(entries) if entry.good), None)
        return min(entries, key=lambda entry: entry.value if self.rule.lower else -entry.value, default=None)

    @property
    def exhausted(self) -> bool:
        """Whether as many measurements in a row as the patience allows have failed, or the images broke a limit."""
        patience = self.settings.early_stopping_patience
        if self.guards is not None and self.guards.broken:
            return True
        plateaus = self.settings.on_plateau == "continue"
        passed = [entry.good if plateaus else entry.improved for entry in reversed(self.history)]
        waited = passed.index(True) if True in passed else len(passed)
        return patience is not None and waited >= patience

    def on_train_begin(self, state: TrainingState) -> None:
        """Ends a run at once that was resumed at the step at which it stopped."""
        state.should_stop |= self.exhausted

    def on_log(self, state: TrainingState) -> None:
        """Adds the step's measurement, if there is one; stores its weights where it is the best, or ends the run."""
        value = state.metrics.get(self.metric)
        if value is None:
            return
        improved, good = self._compare(value)
        within = self.guards is None or not self.guards.broken
        self.history.append(Entry(state.step, value, improved, good, within))
        best = self.best
        if self.settings.load_best_model_at_end and best is not None and best.step == state.step:
            save_best(self.run)
        if self.exhausted and not state.should_stop:
            state.should_stop = True
            self._report(state.step)

    def _compare(self, value: float) -> tuple[bool, bool]:
        """Whether the measurement improves on the last improvement, and whether it is not worse than the best one."""
        now, prompts = self.heldout.of_pairs[self.metric], self.heldout.points.source.table.prompts
        if not math.isfinite(value):
            return False, False
        improved = not self.improvement or self.rule.improves(self.improvement, now, prompts)
        if improved:
            self.improvement = now
        higher = not self.top or Rule(self.rule.lower, confidence=None).improves(self.top, now, prompts)
        good = higher or not self.rule.improves(now, self.top, prompts)
        if higher:
            self.top = now
        return improved, good

    def on_stop(self, state: TrainingState) -> None:
        """Loads the best weights, in every process."""
        best = self.best
        if not self.settings.load_best_model_at_end or best is None:
            return
        if self.run.accelerator.is_main_process:
            log.info("the final weights are those of step %d: %s", best.step, self._named(best))
        if best.step != state.step:
            load_best(self.run)
            state.weights_of = best.step

    def on_train_end(self, state: TrainingState) -> None:
        """Removes the folder of the best weights, which are the final ones now."""
        if self.run.accelerator.is_main_process:
            remove(self.run.output_dir / BEST)

    def save_state(self, folder: Path) -> dict[str, Any]:
        """The measurements, and the best weights beside the checkpoint's own."""
        if self.settings.load_best_model_at_end and self.best is not None:
            shutil.copytree(self.run.output_dir / BEST, folder / BEST, copy_function=_link)
        history = [astuple(entry) for entry in self.history]
        return {"history": history, "improvement": self.improvement, "top": self.top}

    def load_state(self, state: dict[str, Any], folder: Path) -> None:
        """Takes the measurements and the best weights of that time.

        Raises CheckpointError for a checkpoint without the weights of its best measurement, and for measurements that
        an older version made.
        """
        if state.get("history") and "top" not in state:
            raise CheckpointError(
                f"validation: an older version wrote the held-out measurements in {folder}, which say too little; "
                "resume with that version, or start anew"
            )
        self.history = [Entry(*entry) for entry in state.get("history", ())]
        self.improvement, self.top = state.get("improvement", {}), state.get("top", {})
        if not self.settings.load_best_model_at_end or self.best is None:
            return
        if not (folder / BEST).is_dir():
            raise CheckpointError(
                f"validation.load_best_model_at_end: {folder} does not contain the weights of its best measurement, "
                f"step {self.best.step}; resume from another checkpoint, or set it to false"
            )
        if self.run.accelerator.is_main_process:
            with written_whole(self.run.output_dir / BEST) as partial:
                shutil.copytree(folder / BEST, partial, copy_function=_link)
        self.run.accelerator.wait_for_everyone()

    def _named(self, best: Entry) -> str:
        """The value of the final weights' measurement."""
        latest = " (the latest that is not worse than the best by more than chance)"
        return f"{best.value:.4g}" + (latest if self.settings.plateau_weights == "latest" else "")

    def _report(self, step: int) -> None:
        """Logs why the run ends, and adds it to the events of the run."""
        says = f"early stopping: {self._why()}; {self._which()}"
        if self.run.accelerator.is_main_process:
            log.info("step %d: %s", step, says)
            event = {"step": step, "rule": "early_stopping", "action": "end", "says": says}
            add_event(self.run.output_dir / HEALTH_FILE, event)

    def _why(self) -> str:
        settings, last = self.settings, self.history[-1]
        if self.guards is not None and self.guards.broken:
            return self.guards.broken
        patience, threshold = settings.early_stopping_patience, settings.early_stopping_threshold
        by = f" by more than {threshold:g}" if threshold else ""
        by += "" if self.rule.confidence is None else " by more than chance" if not by else " and chance"
        if settings.on_plateau == "continue":
            return f"{self.metric} was worse than its best{by} in {patience} measurements; it is {last.value:.4g}"
        return f"{self.metric} has not improved{by} in {patience} measurements; it is {last.value:.4g}"

    def _which(self) -> str:
        best = self.best
        if best is None:
            return "no measurement qualifies for the final weights"
        if self.settings.plateau_weights == "latest":
            return f"the latest good one is {best.value:.4g} at step {best.step}"
        return f"the best is {best.value:.4g} at step {best.step}"


def save_best(run: Trainable) -> None:
    """Writes the weights as they are (the EMA's where there is one) to the folder of the best ones.

    Raises NoSpaceError where the disk is full.
    """
    with run.averaged_weights(), run.ready_to_save():
        if run.accelerator.is_main_process:
            needed = tensor_bytes(run.parameters)
            with written_whole(run.output_dir / BEST, needed, "the best weights", NO_ROOM) as partial:
                partial.mkdir()
                run.save_weights(partial)
    run.accelerator.wait_for_everyone()


def load_best(run: Trainable) -> None:
    """Loads what `save_best` wrote into the trained module, and into the EMA where there is one."""
    run.load_weights(run.output_dir / BEST)
    if run.ema is not None:
        for average, weight in zip(run.ema.shadow_params, parts(run.parameters), strict=True):
            average.data.copy_(weight.data)
    run.accelerator.wait_for_everyone()


def _link(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
