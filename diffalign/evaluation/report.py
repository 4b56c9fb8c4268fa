"""What an evaluation found: as a record, as JSON, as the table that is printed."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean
from typing import Any

from diffalign.errors import DiffalignError
from diffalign.evaluation.guards import Look
from diffalign.evaluation.stats import Estimate, Paired
from diffalign.io.files import save_text

BASE = "base"  # the name of the model that all others are compared with
PACKAGES = ("diffalign", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")
LONGEST_NAME = 100  # characters; a name is part of a folder's


def check_name(name: str) -> None:
    """Raises DiffalignError for a model's name that is none: it stands in tables and in the name of a folder."""
    odd = next((c for c in name if not c.isprintable() or c in '/\\:*?"<>|'), None)
    if name != name.strip() or not name or name.startswith(".") or len(name) > LONGEST_NAME or odd is not None:
        raise DiffalignError(
            f"{name[:60]!r} is no name for a model: give letters, digits, spaces and marks such as - _ + . (no "
            f'slash, none of : * ? " < > |, no dot in front, at most {LONGEST_NAME} characters)'
        )


def run_title(name: str, run: int, runs: int) -> str:
    """A model as progress lines name it: by the name that was given and, of several training runs, which (from 1)."""
    return name if runs == 1 else f"{name}, run {run} of {runs}"


@dataclass(frozen=True)
class ModelResult:
    """One tuned model (or several training runs of one) against the base."""

    name: str
    scores: dict[str, Paired]  # by scorer name
    run_gains: dict[str, list[float]]  # by scorer name: each training run's own mean gain
    faithfulness: Paired | None  # the faithfulness scorer, tuned against base
    groups: dict[str, dict[str, Paired]]  # by scorer and group of prompts, for scorers that make groups
    diversity: Estimate | None  # spread between seeds over the base's; None with one seed
    look: Look


@dataclass(frozen=True)
class Result:
    """Everything an evaluation measured. Lead with `models[i].scores[...].gain`; see docs/evaluation.md."""

    models: list[ModelResult]
    base_look: Look
    prompts: list[str]
    prompt_set: dict[str, Any]  # their number and hash, and the named set that they are of (`which_set`)
    seeds: list[int]
    faithfulness: str | None  # name of the scorer used for it
    settings: dict[str, Any]  # by model name: how its images were made
    versions: dict[str, str]

    def to_json(self) -> str:
        """Indented JSON; NaN (an interval that does not exist) becomes null."""
        return json.dumps(without_nan(dataclasses.asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, file: str | Path) -> None:
        """The JSON to a file."""
        save_text(Path(file), self.to_json())

    def table(self) -> str:
        """One block per scorer, one line per model; and one block per scorer that groups prompts."""
        blocks = [self._block(name) for name in self.models[0].scores]
        return "\n\n".join(blocks + [self._groups_block(name) for name in self.models[0].groups])

    def _groups_block(self, scorer: str) -> str:
        """A scorer by groups of prompts; the last line is the mean over groups, whatever their sizes."""
        groups = list(self.models[0].groups[scorer])
        rows = [["group", "prompts", BASE, *(f"{model.name} (change)" for model in self.models)]]
        for group in groups:
            found = [model.groups[scorer][group] for model in self.models]
            cells = [f"{one.tuned:.3f} ({interval_text(one.gain, 3, sign=True)})" for one in found]
            rows.append([group, str(found[0].prompts), f"{found[0].base:.3f}", *cells])
        of_models = [[model.groups[scorer][group] for group in groups] for model in self.models]
        bases = [mean(one.base for one in some) for some in of_models]
        tuned = [mean(one.tuned for one in some) for some in of_models]
        means = [f"{own:.3f} ({own - base:+z.3f})" for own, base in zip(tuned, bases, strict=True)]
        rows.append(["mean of groups", "", f"{bases[0]:.3f}", *means])
        return "\n".join([f"{scorer} by group of prompts: mean scores", *aligned(rows)])

    def _block(self, scorer: str) -> str:
        first = self.models[0].scores[scorer]
        head = (
            f"scorer {scorer}: base mean {first.base:.4f}; {len(self.prompts)} prompts x {len(self.seeds)} seeds; "
            f"[{first.level:.0%} interval, clustered by prompt]; tie: |dR| < {first.tie:g}"
        )
        rows = [["model", "dR", "win/tie/loss", "win rate"]]
        if self.faithfulness:
            rows[0].append(f"{self.faithfulness} (change)")
        rows[0] += ["diversity", "runs"]
        digits = 4 if first.tie < 0.001 else 3
        for model in self.models:
            score = model.scores[scorer]
            row = [
                model.name,
                interval_text(score.gain, digits, sign=True),
                f"{score.wins}/{score.ties}/{score.losses}",
                interval_text(score.win_rate, 3),
            ]
            if model.faithfulness:
                row.append(f"{model.faithfulness.tuned:.3f} ({interval_text(model.faithfulness.gain, 3, sign=True)})")
            row += [interval_text(model.diversity, 2) if model.diversity else "-", str(score.runs)]
            rows.append(row)
        return "\n".join([head, *aligned(rows)])


def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on, as installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def interval_text(estimate: Estimate, digits: int, sign: bool = False) -> str:
    """A value with its interval, as it stands in tables."""
    style = f"{'+' if sign else ''}z.{digits}f"  # z: zero has no minus
    if math.isnan(estimate.low):
        return f"{estimate.value:{style}} [no interval]"
    return f"{estimate.value:{style}} [{estimate.low:{style}}, {estimate.high:{style}}]"


def aligned(rows: list[list[str]]) -> list[str]:
    """The rows of a table as lines, every column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def without_nan(value: Any) -> Any:
    """A value as JSON has it: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
