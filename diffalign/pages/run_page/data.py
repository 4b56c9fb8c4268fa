"""What a run has written so far, read for its page: metrics, margins, timing, health reports, images, settings.

The files may be those of a run that goes on, was killed, or was resumed: an incomplete line is left out and counted,
and where steps go back the later lines replace the earlier ones, as a resumed run's do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffalign.errors import MissingFileError

METRICS, MARGINS, TIMING, HEALTH = "metrics.jsonl", "margins.jsonl", "timing.jsonl", "health.jsonl"
IMAGE = re.compile(r"step-(\d+)\.png")
Line = dict[str, Any]


@dataclass(frozen=True)
class RunState:
    """Whether a run goes on."""

    kind: Literal["running", "finished", "ended"]
    detail: str = ""  # why it ended before its last step, or which weights are the final ones
    step: int | None = None  # where its process is; None: read from what it logged


@dataclass(frozen=True)
class RunData:
    """Everything that a page shows of one run."""

    name: str
    folder: Path
    settings: Mapping[str, Any]  # the resolved config
    state: RunState
    lines: list[Line]  # of metrics.jsonl; steps rise; values are finite numbers or None
    margins: list[Line]  # step, width, counts: pairs by logit, in bins centred at multiples of the width
    timing: list[Line]  # step, seconds, pairs, unet_forwards
    health: list[Line]
    facts: Mapping[str, Any]  # run.json
    images: list[tuple[int, Path]]  # validation images by step
    start_loss: float | None = None  # the objective's loss of a policy that equals its reference
    problems: list[str] = field(default_factory=list)  # what could not be read

    @property
    def step(self) -> int:
        """The last step known."""
        logged = int(self.lines[-1]["step"]) if self.lines else 0
        return logged if self.state.step is None else max(self.state.step, logged)

    @property
    def max_steps(self) -> int | None:
        """`training.max_train_steps`."""
        steps = (self.settings.get("training") or {}).get("max_train_steps")
        return steps if isinstance(steps, int) else None

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics, in the order in which they first appear."""
        return [name for name in dict.fromkeys(n for line in self.lines for n in line) if name != "step"]

    def series(self, name: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of a metric at the logs that have it; None where it was not finite."""
        there = [line for line in self.lines if name in line]
        return [line["step"] for line in there], [line[name] for line in there]


def read_run(
    folder: Path, settings: Mapping[str, Any], state: RunState, *, name: str = "", start_loss: float | None = None
) -> RunData:
    """Reads the folder of a run. Raises MissingFileError for one without config.yaml and metrics.jsonl."""
    if not folder.is_dir() or not any((folder / file).is_file() for file in ("config.yaml", METRICS)):
        raise MissingFileError(
            f"{folder} is not the folder of a run: it has neither config.yaml nor {METRICS}; give an output_dir"
        )
    problems: list[str] = []
    lines = _rising([line for line in read_lines(folder / METRICS, problems) if _is_step(line.get("step"))])
    return RunData(
        name=name or folder.resolve().name,
        folder=folder,
        settings=settings,
        state=state,
        lines=[{key: _number(key, value) for key, value in line.items() if _is_number(value)} for line in lines],
        margins=_rising([line for line in read_lines(folder / MARGINS, problems) if _is_histogram(line)]),
        timing=_rising([line for line in read_lines(folder / TIMING, problems) if _is_timing(line)]),
        health=read_lines(folder / HEALTH, problems),
        facts=_facts(folder / "run.json", problems),
        images=_images(folder / "validation"),
        start_loss=start_loss,
        problems=problems,
    )


def read_lines(path: Path, problems: list[str]) -> list[Line]:
    """The complete lines of a file, each a JSON object; the number of others goes to `problems`. Empty without it."""
    found: list[Line] = []
    bad = 0
    if not path.is_file():
        return found
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text, parse_int=_whole)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict):
            found.append(line)
        else:
            bad += bool(text.strip())
    if bad:
        problems.append(f"{path.name}: {bad} incomplete line{'s' if bad > 1 else ''} left out")
    return found


def thinned(series: Sequence[Sequence[float | None]], limit: int) -> list[int]:
    """Indices of about `limit` points, so that the extremes of every series remain; all of them where they are few.

    The points are divided into stretches of equal length. Each gives the smallest and the largest value of each
    series, and the first gap. The first and the last point stay.
    """
    size = len(series[0]) if series else 0
    if size <= limit:
        return list(range(size))
    stretches = max(1, limit // (2 * len(series)))
    chosen = {0, size - 1}
    for k in range(stretches):
        inside = range(k * size // stretches, (k + 1) * size // stretches)
        for values in series:
            there = [(value, i) for i in inside if (value := values[i]) is not None]
            if there:
                chosen |= {min(there)[1], max(there)[1]}
            chosen |= {next((i for i in inside if values[i] is None), inside[0])}
    return sorted(chosen)


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _rising(lines: list[Line]) -> list[Line]:
    """Lines whose steps rise: where steps go back, the earlier lines from there on are those that were taken again."""
    found: list[Line] = []
    for line in lines:
        while found and found[-1]["step"] >= line["step"]:
            found.pop()
        found.append(line)
    return found


def _is_step(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(key: str, value: float | None) -> float | None:
    if key == "step":
        return int(value or 0)
    return value if value is not None and math.isfinite(value) else None


def _is_histogram(line: Line) -> bool:
    counts = line.get("counts")
    return _is_step(line.get("step")) and isinstance(counts, list) and all(_is_step(n) for n in counts)


def _is_timing(line: Line) -> bool:
    return all(_is_step(line.get(key)) for key in ("step", "seconds", "pairs"))


def _whole(digits: str) -> float:
    """An integer of JSON, which may have more digits than a float holds."""
    return int(digits) if len(digits) < 300 else float(digits)


def _facts(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError):
        found = None
    if not isinstance(found, dict):
        problems.append(f"{path.name} is not readable")
        return {}
    return found


def _images(folder: Path) -> list[tuple[int, Path]]:
    """Validation images by step."""
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    return sorted((int(match[1]), path) for path in names if (match := IMAGE.fullmatch(path.name)))
