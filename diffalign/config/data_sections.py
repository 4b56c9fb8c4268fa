"""Parts of a config that have a form of their own: axes of scores, the curriculum, and paths of what is shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from diffalign.config.value_types import LARGEST, Count, PathText, Positive, Section, Text
from diffalign.data.table.score_aggregation import Axis
from diffalign.errors import DiffalignError


class ScoreAxis(Section):
    """One of several scorers in `data.scores`."""

    file: PathText  # of `diffalign data score`
    weight: Positive = 1.0  # what a unit of this score is worth


class CurriculumSection(Section):
    """Easy pairs first: the pool grows from those with the largest score gaps to all."""

    chunks: Annotated[Count, Field(ge=2)]
    steps: Count | None = None  # optimiser steps until its end; null: max_train_steps


Scores = PathText | tuple[PathText, ...] | dict[Text, PathText | ScoreAxis]  # a file, several, or named ones


def checked_scores(node: Any) -> Any:
    """`data.scores` as given. Raises ValueError in words where pydantic would name each form that a value has not."""
    several = isinstance(node, dict | list | tuple)
    if several and not node:
        raise DiffalignError("names no file; give one, a list of them, or a mapping axis: file")
    for value in node.values() if isinstance(node, dict) else node if several else [node]:
        if isinstance(value, str | ScoreAxis) or value is node is None:
            continue
        if not (isinstance(node, dict) and isinstance(value, dict)):
            raise DiffalignError(f"{value!r} is no file; give a path, a list of paths, or a mapping axis: path")
        weight = value.get("weight", 1.0)
        good = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight <= LARGEST
        if value.keys() - {"file", "weight"} or not isinstance(value.get("file"), str) or not good:
            raise DiffalignError(
                f"{value!r} is no axis; write {{file: PATH, weight: NUMBER ABOVE 0}}, the weight optional"
            )
    return node


def axes_of(scores: Scores | None) -> list[Axis]:
    """The files of scores with their names and weights; empty without any."""
    if isinstance(scores, dict):
        named = {name: axis if isinstance(axis, ScoreAxis) else ScoreAxis(file=axis) for name, axis in scores.items()}
        return [Axis(name, axis.file, axis.weight) for name, axis in named.items()]
    return [Axis(file, file) for file in ([scores] if isinstance(scores, str) else scores or ())]


def packaged_asset(path: Any) -> Any:
    """`assets/…` names what comes with diffalign, from whichever folder a command is run; other paths stay."""
    if isinstance(path, str) and path.startswith("assets/") and not Path(path).exists():
        package = Path(__file__).resolve().parents[1]
        for folder in (package.parent / "assets", package / "_assets"):
            if (found := folder / path.removeprefix("assets/")).exists():
                return str(found)
    return path
