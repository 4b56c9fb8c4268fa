"""Runs cases and classifies their endings; the report counts them by kind and lists the faults with their seeds."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from diffalign.errors import explain, printable

Run = Callable[[], Any]  # gives the numbers that must be finite
Kind = Callable[[Random, Path], Run]  # writes an input into the folder


@dataclasses.dataclass(frozen=True)
class Fault:
    """A case that ended as none may."""

    kind: str
    seed: int
    number: int
    what: str

    def __str__(self) -> str:
        return f"python -m tests.fuzz --again {self.kind} {self.seed} {self.number}: {self.what}"


@dataclasses.dataclass
class Report:
    """Counts of endings by kind, CPU seconds by kind, and the faults."""

    endings: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    faults: list[Fault] = dataclasses.field(default_factory=list)

    @property
    def cases(self) -> int:
        """How many were run."""
        return sum(sum(found.values()) for found in self.endings.values())

    def text(self) -> str:
        """A line for each kind, then the faults."""
        lines = [f"{self.cases} bad inputs in {sum(self.seconds.values()):.1f} s of CPU"]
        for kind, found in self.endings.items():
            counts = ", ".join(f"{count} {ending}" for ending, count in found.most_common())
            lines.append(f"{kind:>14}  {self.seconds[kind]:6.1f} s  {counts}")
        return "\n".join([*lines, *map(str, self.faults)])


def run(kinds: Mapping[str, tuple[Kind, int]], seed: int = 0) -> Report:
    """As many cases of each kind as its number says."""
    report = Report()
    for name, (kind, count) in kinds.items():
        begun, found = time.process_time(), Counter[str]()
        for number in range(count):
            try:
                found[one(name, kind, seed, number)] += 1
            except AssertionError as error:
                found["FAULT"] += 1
                report.faults.append(Fault(name, seed, number, str(error)))
        report.endings[name], report.seconds[name] = found, time.process_time() - begun
    return report


def one(name: str, kind: Kind, seed: int, number: int) -> str:
    """How one case ends: "right" or "refused". Raises AssertionError for any other end, whose cause is the fault."""
    rng = Random(f"{name} {seed} {number}")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = kind(rng, Path(folder))
        try:
            result = case()
        except AssertionError:
            raise
        except (Exception, SystemExit) as error:
            return _refused(error)
        odd = not_finite(result)
        assert odd is None, f"success with {odd}"
        return "right"


def _refused(error: BaseException) -> str:
    said = explain(error) if isinstance(error, Exception) else None
    if said is None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        raise AssertionError(f"{type(error).__name__} at {where}: {printable(str(error))[:300]!r}") from error
    assert said.strip(), f"{type(error).__name__} without a message"
    assert len(said) < 4000, f"a message of {len(said)} characters: {said[:100]!r}"
    return "refused"


def not_finite(value: Any) -> str | None:
    """The first number in a value that is NaN or infinite, in words; None where all are finite."""
    if isinstance(value, torch.Tensor):
        value = value.detach().double().numpy() if value.is_floating_point() else np.zeros(0)
    if isinstance(value, np.ndarray):
        return None if np.isfinite(value).all() else f"an array that holds {value[~np.isfinite(value)].flat[0]}"
    if isinstance(value, float):
        return None if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        found = ((key, not_finite(item)) for key, item in value.items())
        return next((f"{key}: {what}" for key, what in found if what), None)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return next((what for what in map(not_finite, value) if what), None)
    return None
