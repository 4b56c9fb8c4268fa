"""The figures that sum up a run: at the head of its page, in the table of several, and at the end of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffalign.pages.run_page.charts import rates
from diffalign.pages.run_page.data import RunData

LAST = 10  # the end of a run is the mean of the last tenth of its logs
RECENT = 10  # logs that the time left is estimated from
ACCURACIES = ("implicit_acc", "accuracy")  # of an objective, of a preference model


@dataclass(frozen=True)
class Change:
    """A metric at the first log and over the last tenth of them."""

    first: float
    last: float
    logs: int  # that `last` is the mean of


@dataclass(frozen=True)
class Interval:
    """A held-out metric where it was last measured."""

    first: float
    last: float
    low: float | None
    high: float | None
    step: int


@dataclass(frozen=True)
class Figures:
    """What happened; None where it is not recorded."""

    step: int
    max_steps: int | None
    pairs: int | None
    seconds: float | None
    pairs_per_second: float | None
    seconds_left: float | None  # at the speed of the last logs; None for a run that has ended
    forwards: int | None
    peak_memory: float | None  # bytes on the device of the main process
    loss: Change | None
    accuracy: Change | None
    heldout: Interval | None  # accuracy
    reports: list[str]  # health, a line each


def figures(run: RunData) -> Figures:
    """The figures of a run as it stands."""
    last: dict[str, Any] = run.timing[-1] if run.timing else {}
    forwards = next((x["unet_forwards"] for x in reversed(run.lines) if x.get("unet_forwards") is not None), None)
    seconds, pairs = last.get("seconds"), last.get("pairs")
    changes = (change(run, name) for name in ACCURACIES)
    return Figures(
        step=run.step,
        max_steps=run.max_steps,
        pairs=None if pairs is None else int(pairs),
        seconds=seconds,
        pairs_per_second=pairs / seconds if seconds else None,
        seconds_left=_left(run) if run.state.kind == "running" else None,
        forwards=None if forwards is None else int(forwards),
        peak_memory=last.get("peak_memory"),
        loss=change(run, "loss"),
        accuracy=next((found for found in changes if found is not None), None),
        heldout=_interval(run, "heldout/accuracy"),
        reports=[report(event) for event in run.health],
    )


def change(run: RunData, name: str) -> Change | None:
    """How a metric changed; None where it has no finite value."""
    values = [value for value in run.series(name)[1] if value is not None]
    if not values:
        return None
    logs = max(1, len(values) // LAST)
    return Change(values[0], sum(values[-logs:]) / logs, logs)


def report(event: dict[str, Any]) -> str:
    """A line of health.jsonl in words."""
    at = event.get("at", event.get("step", "?"))
    done = {"warn": "", "stop": " (the run was stopped)", "roll_back": f" (back to step {event.get('step')})"}
    return f"step {at}: {event.get('says', event.get('rule', '?'))}{done.get(str(event.get('action')), '')}"


def duration(seconds: float) -> str:
    """3 h 07 min, 12 min 05 s, 48 s."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def _left(run: RunData) -> float | None:
    """Seconds to `training.max_train_steps` at the speed of the last logs."""
    if run.max_steps is None or not rates(run)[0]:
        return None
    first, last = run.timing[-RECENT:][0], run.timing[-1]
    steps = last["step"] - first["step"]
    return (run.max_steps - run.step) * (last["seconds"] - first["seconds"]) / steps if steps > 0 else None


def _interval(run: RunData, name: str) -> Interval | None:
    lines = [line for line in run.lines if line.get(name) is not None]
    if not lines:
        return None
    last = lines[-1]
    return Interval(lines[0][name], last[name], last.get(f"{name}/low"), last.get(f"{name}/high"), last["step"])
