"""Actions on the findings of `training/callbacks/health.py`: a warning, the end of the run, or a return to the last
good checkpoint with a lower learning rate. Each action is a line of `health.jsonl` in the run's folder.

A stop writes no checkpoint: a rule rejects the present weights, and `checkpoints_total_limit` could remove good ones
for them. A roll back takes the newest checkpoint from before the rule's window, sets later ones aside as resuming does,
and multiplies the learning rate by `health.lr_factor`. The same pairs and draws come again; only the learning rate
differs. Its factor follows from the recorded roll backs, so a run that is killed and resumed has it as well.

All processes read the same lines and decide alike; the main one writes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.config.health_section import HealthSection
from diffalign.io.files import save_text
from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.callbacks.health import NOT_FINITE, Finding, Watch, broken_metric
from diffalign.training.callbacks.health_rules import Limits
from diffalign.training.checkpoints.checkpoint import checkpoints, newest_intact
from diffalign.training.checkpoints.run_state import diverged, finish_saving
from diffalign.training.metrics import HEALTH_FILE, METRICS_FILE
from diffalign.training.optim.optimizers import set_rates
from diffalign.training.processes import on_main
from diffalign.training.trainable import Trainable, TrainingError

log = logging.getLogger(__name__)


class Health(Callback):
    """The rules of a run, and the actions taken so far."""

    def __init__(self, run: Trainable, settings: HealthSection) -> None:
        self.run, self.settings = run, settings
        self.path = run.output_dir / HEALTH_FILE
        self.events: list[dict[str, Any]] = []

    @property
    def roll_backs(self) -> int:
        """How often the run returned to a checkpoint."""
        return sum(event["action"] == "roll_back" for event in self.events)

    def on_train_begin(self, state: TrainingState) -> None:
        """Reads the run's own lines and events up to the present step, in every process; sets the learning rate."""
        self._begin(state.step)

    def on_log(self, state: TrainingState) -> None:
        """Applies the rules to the new line and acts on what they find.

        Raises TrainingError where the run is to stop: always when loss or gradient are not finite and it cannot
        return to a checkpoint, otherwise as `health.action` says.
        """
        state.return_to = self.check(state.step, state.metrics)
        if self.roll_backs:
            state.metrics["roll_backs"] = float(self.roll_backs)

    def check(self, step: int, values: Mapping[str, float]) -> Path | None:
        """The checkpoint to return to because of the metrics of a step, or None."""
        line = {**values, "step": float(step)}
        broken = broken_metric(line)
        if broken is not None:
            finish_saving(self.run)
            before = max((int(p.name.partition("-")[2]) for p in checkpoints(self.run.output_dir)), default=0)
            return self._act(step, line, Finding(NOT_FINITE, broken, before, True))
        if self.settings.action == "none":
            return None
        found = self.watch.check(line)
        for finding in found:
            if self.settings.action == "warn" or (self.settings.action == "roll_back" and not finding.lower_lr):
                self._warn(step, finding)
        acting = [f for f in found if self.settings.action == "stop" or f.lower_lr]
        if self.settings.action == "warn" or not acting:
            return None
        return self._act(step, line, min(acting, key=lambda finding: finding.since))

    def _act(self, step: int, line: Mapping[str, float], finding: Finding) -> Path | None:
        """The checkpoint to return to, recorded; raises where there is none to return to."""
        finish_saving(self.run)
        good = on_main(self.run.accelerator, lambda: self._newest_before(finding.since))  # others may list files late
        s = self.settings
        if s.action == "roll_back" and good is not None and self.roll_backs < s.max_roll_backs:
            to = int(good.name.partition("-")[2])
            factor = s.lr_factor ** (self.roll_backs + 1)
            self._record(
                {"step": to, "at": step, "rule": finding.rule, "action": "roll_back", "says": finding.message,
                 "lr_factor": factor, "metrics": {k: v if math.isfinite(v) else None for k, v in line.items()}}
            )  # fmt: skip
            if self.run.accelerator.is_main_process:
                back = "step %d: %s. Returning to %s with the learning rate times %g"
                log.warning(back, step, finding.message, good.name, factor)
            return good
        self._record({"step": step, "rule": finding.rule, "action": "stop", "says": finding.message})
        tried = f" after {self.roll_backs} roll backs" if self.roll_backs else ""
        if finding.rule == NOT_FINITE:
            raise diverged(self.run.output_dir, f"{finding.message}{tried}")
        resume = (
            f"{good.name} is the last checkpoint from before it (training.resume_from_checkpoint={good.name})"
            if good is not None
            else "there is no checkpoint from before it"
        )
        raise TrainingError(f"stopped at step {step}{tried} by health.action: {s.action}: {finding.message}; {resume}")

    def _newest_before(self, step: int) -> Path | None:
        return newest_intact(p for p in checkpoints(self.run.output_dir) if int(p.name.partition("-")[2]) <= step)

    def _warn(self, step: int, finding: Finding) -> None:
        self._record({"step": step, "rule": finding.rule, "action": "warn", "says": finding.message})
        if self.run.accelerator.is_main_process:
            log.warning("step %d: %s", step, finding.message)

    def _record(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if self.run.accelerator.is_main_process:
            add_event(self.path, event)

    def _begin(self, start: int) -> None:
        """Reads the run's own files as they were at `start`; the same in every process."""

        def read() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
            events = _before(_read(self.path), start)
            if self.path.exists():
                save_text(self.path, "".join(f"{json.dumps(event)}\n" for event in events))
            return events, [x for x in _read(self.run.output_dir / METRICS_FILE) if x["step"] <= start]

        self.events, lines = on_main(self.run.accelerator, read)
        self.watch = Watch(Limits(self.settings, self.run.config.training))
        for line in lines:
            self.watch.check(line)
        if self.settings.action != "warn":
            self.watch.open.clear()  # what is still bad is found again, and acted upon
        if self.roll_backs:
            factor = self.settings.lr_factor**self.roll_backs
            groups = len(self.run.optimizer.param_groups)
            set_rates(self.run.optimizer, self.run.lr_scheduler, [self.run.lr * factor] * groups)


def add_event(path: Path, event: Mapping[str, Any]) -> None:
    """Appends an event of a run to its file."""
    with path.open("a") as file:
        file.write(json.dumps(event) + "\n")


def _before(events: list[dict[str, Any]], start: int) -> list[dict[str, Any]]:
    """The events that led to the run as it stands at `start`: all up to the last one that is not after it."""
    earlier = [i for i, event in enumerate(events) if event["step"] <= start]
    return events[: earlier[-1] + 1] if earlier else []


def _read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file; a killed run may leave an incomplete one."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
