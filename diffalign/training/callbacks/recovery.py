"""What happens when a rule of `training/callbacks/health.py` speaks: a warning, a clear end, or a return to the last
good checkpoint with a lower learning rate. Everything that happens is a line of `health.jsonl` in the run's folder.

A stop writes no checkpoint: the weights are those that a rule called sick, and rotation could remove a good one for
them. A roll back takes the newest checkpoint from before the rule's window, sets later ones aside as resuming does,
and multiplies the learning rate by `health.lr_factor`. The same pairs and draws come again: what differs is the
learning rate. That factor follows from the roll backs recorded, so a killed run that is resumed has it as well.

All processes decide alike, because they hold the same lines; the main one writes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from diffalign.errors import DiffalignError
from diffalign.training.build import Run
from diffalign.training.callbacks.health import NOT_FINITE, Finding, Limits, Watch, not_finite
from diffalign.training.checkpoints.checkpoint import checkpoints, newest_whole
from diffalign.training.optim.optimizers import set_rates

log = logging.getLogger(__name__)

HEALTH_FILE = "health.jsonl"
METRICS_FILE = "metrics.jsonl"


class TrainingError(DiffalignError):
    """A run that cannot go on."""


class Guard:
    """The rules of a run, and what was done about them."""

    def __init__(self, run: Run, start: int) -> None:
        """Takes up the lines and events of a run that stands at `start`, in every process; sets the learning rate."""
        self.run, self.settings = run, run.config.health
        self.path = run.output_dir / HEALTH_FILE
        self.events: list[dict[str, Any]] = []
        self._begin(start)

    @property
    def roll_backs(self) -> int:
        """How often the run went back."""
        return sum(event["action"] == "roll_back" for event in self.events)

    def look(self, step: int, values: Mapping[str, float]) -> Path | None:
        """Judges what is logged at `step`; returns the checkpoint to go back to, or None to go on.

        Raises TrainingError where the run is to stop: always when loss or gradient are no numbers and it cannot go
        back, otherwise as `health.action` says.
        """
        line = {**values, "step": float(step)}
        broken = not_finite(line)
        if broken is not None:
            before = max((int(p.name.partition("-")[2]) for p in checkpoints(self.run.output_dir)), default=0)
            return self._act(step, line, Finding(NOT_FINITE, broken, before, True))
        if self.settings.action == "none":
            return None
        found = self.watch.look(line)
        for finding in found:
            if self.settings.action == "warn" or (self.settings.action == "roll_back" and not finding.lower_lr):
                self._warn(step, finding)
        acting = [f for f in found if self.settings.action == "stop" or f.lower_lr]
        if self.settings.action == "warn" or not acting:
            return None
        return self._act(step, line, min(acting, key=lambda finding: finding.since))

    def went_back(self, to: int) -> None:
        """After the run's state is that of step `to`: forgets later lines and lowers the learning rate."""
        self._begin(to)

    def metrics(self) -> dict[str, float]:
        """What a line of metrics says of the past: `roll_backs`, once there is one."""
        return {"roll_backs": float(self.roll_backs)} if self.roll_backs else {}

    def _act(self, step: int, line: Mapping[str, float], finding: Finding) -> Path | None:
        """The checkpoint to return to, recorded; raises where there is none to return to."""
        there = [p for p in checkpoints(self.run.output_dir) if int(p.name.partition("-")[2]) <= finding.since]
        good = newest_whole(there)
        s = self.settings
        if s.action == "roll_back" and good is not None and self.roll_backs < s.max_roll_backs:
            to = int(good.name.partition("-")[2])
            factor = s.lr_factor ** (self.roll_backs + 1)
            self._record(
                {"step": to, "at": step, "rule": finding.rule, "action": "roll_back", "says": finding.says,
                 "lr_factor": factor, "metrics": {k: v if math.isfinite(v) else None for k, v in line.items()}}
            )  # fmt: skip
            if self.run.accelerator.is_main_process:
                back = "step %d: %s. Back to %s with the learning rate times %g"
                log.warning(back, step, finding.says, good.name, factor)
            return good
        self._record({"step": step, "rule": finding.rule, "action": "stop", "says": finding.says})
        tried = f" after {self.roll_backs} roll backs" if self.roll_backs else ""
        if finding.rule == NOT_FINITE:
            raise diverged(self.run.output_dir, f"{finding.says}{tried}")
        resume = (
            f"{good.name} is the last checkpoint from before it (training.resume_from_checkpoint={good.name})"
            if good is not None
            else "there is no checkpoint from before it"
        )
        raise TrainingError(f"stopped at step {step}{tried} by health.action: {s.action}: {finding.says}; {resume}")

    def _warn(self, step: int, finding: Finding) -> None:
        self._record({"step": step, "rule": finding.rule, "action": "warn", "says": finding.says})
        if self.run.accelerator.is_main_process:
            log.warning("step %d: %s", step, finding.says)

    def _record(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if self.run.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(event) + "\n")

    def _begin(self, start: int) -> None:
        """Reads the run's own files as they were at `start`; the same in every process."""
        accelerator = self.run.accelerator
        found: list[Any] = [None]
        if accelerator.is_main_process:
            events = _before(_read(self.path), start)
            if self.path.exists():
                self.path.write_text("".join(f"{json.dumps(event)}\n" for event in events))
            lines = [x for x in _read(self.run.output_dir / METRICS_FILE) if x["step"] <= start]
            found = [(events, lines)]
        if accelerator.num_processes > 1:
            found = broadcast_object_list(found)
        self.events, lines = found[0]
        self.watch = Watch(Limits(self.settings, self.run.config.training))
        for line in lines:
            self.watch.look(line)
        if self.settings.action != "warn":
            self.watch.open.clear()  # what is still bad is said again, and acted upon
        if self.roll_backs:
            set_lr(self.run, self.settings.lr_factor**self.roll_backs)


def set_lr(run: Run, factor: float) -> None:
    """The configured learning rate times `factor`, where the schedule stands now."""
    set_rates(run.optimizer, run.lr_scheduler, [run.lr * factor] * len(run.optimizer.param_groups))


def diverged(output_dir: Path, what: str) -> TrainingError:
    """What to say of a run whose loss or weights are no numbers any more."""
    there = checkpoints(output_dir)
    last = f"resume from {there[-1].name}" if there else "start again"
    return TrainingError(f"{what}: lower training.learning_rate, or train in bf16 or fp32 instead of fp16, then {last}")


def _before(events: list[dict[str, Any]], start: int) -> list[dict[str, Any]]:
    """The events that led to the run as it stands at `start`: all up to the last one that is not after it."""
    kept = [i for i, event in enumerate(events) if event["step"] <= start]
    return events[: kept[-1] + 1] if kept else []


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; one that a killed run left half written is no line."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
