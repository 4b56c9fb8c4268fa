"""Parts of a config with their own syntax: score axes, the curriculum, buckets, and paths of packaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from diffalign.config.value_types import LARGEST, MOST, Count, PathText, Positive, Section, Text
from diffalign.data.buckets.sizes import kohya_sizes, sdxl_sizes
from diffalign.data.spec import is_remote
from diffalign.data.table.score_aggregation import Axis
from diffalign.data.transforms import Size
from diffalign.errors import DiffalignError


class ScoreAxis(Section):
    """One of several scorers in `data.scores`."""

    file: PathText  # of `diffalign data score`
    weight: Positive = 1.0  # what a unit of this score is worth


class CurriculumSection(Section):
    """Easy pairs first: the pool grows from those with the largest score gaps to all."""

    chunks: Annotated[Count, Field(ge=2)]
    steps: Count | None = None  # optimiser steps until its end; null: max_train_steps


class BucketsSection(Section):
    """Aspect buckets: each pair comes to the size that crops its images least, in place of a square."""

    table: Literal["sdxl", "kohya"]  # of SDXL's training, scaled to the resolution; or as sd-scripts makes it
    step: Annotated[Count, Field(multiple_of=8)] = 64  # kohya: pixels between the sides of two buckets
    min_side: Count | None = None  # kohya: pixels; null: half the resolution
    max_side: Count | None = None  # kohya: pixels; null: twice the resolution

    @model_validator(mode="after")
    def _kohya_alone(self) -> Self:
        if self.table != "kohya" and (given := sorted(self.model_fields_set - {"table"})):
            raise DiffalignError(f"{given[0]} belongs to table: kohya; remove it, or set table: kohya")
        return self

    def sizes(self, resolution: int) -> tuple[Size, ...]:
        """The sizes of the buckets at a resolution. Raises DataError where there are none."""
        if self.table == "sdxl":
            return sdxl_sizes(resolution)
        return kohya_sizes(resolution, self.step, self.min_side or resolution // 2, self.max_side or 2 * resolution)

    def name(self) -> str:
        """The table and its settings, for the key of a cache; with the resolution they determine the sizes."""
        own = f"kohya step={self.step} min_side={self.min_side} max_side={self.max_side}"
        return own if self.table == "kohya" else self.table


Scores = PathText | tuple[PathText, ...] | dict[Text, PathText | ScoreAxis]  # a file, several, or named ones


def checked_scores(node: Any) -> Any:
    """`data.scores` as given. Raises ValueError with one readable message in place of pydantic's list of forms."""
    several = isinstance(node, dict | list | tuple)
    if several and not node:
        raise DiffalignError("is empty; give a file, a list of files, or a mapping axis: file")
    for value in node.values() if isinstance(node, dict) else node if several else [node]:
        if isinstance(value, str | ScoreAxis) or value is node is None:
            continue
        if not (isinstance(node, dict) and isinstance(value, dict)):
            raise DiffalignError(f"{value!r} is not a file; give a path, a list of paths, or a mapping axis: path")
        weight = value.get("weight", 1.0)
        good = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight <= LARGEST
        if value.keys() - {"file", "weight"} or not isinstance(value.get("file"), str) or not good:
            raise DiffalignError(
                f"{value!r} is not an axis; write {{file: PATH, weight: NUMBER ABOVE 0}}, the weight is optional"
            )
    return node


def axes_of(scores: Scores | None) -> list[Axis]:
    """The files of scores with their names and weights; empty without any."""
    if isinstance(scores, dict):
        named = {name: axis if isinstance(axis, ScoreAxis) else ScoreAxis(file=axis) for name, axis in scores.items()}
        return [Axis(name, axis.file, axis.weight) for name, axis in named.items()]
    return [Axis(file, file) for file in ([scores] if isinstance(scores, str) else scores or ())]


def packaged_asset(path: Any) -> Any:
    """`assets/…` names files that come with diffalign, from any working folder; other paths do not change."""
    if isinstance(path, str) and path.startswith("assets/") and not Path(path).exists():
        package = Path(__file__).resolve().parents[1]
        for folder in (package.parent / "assets", package / "_assets"):
            if (found := folder / path.removeprefix("assets/")).exists():
                return str(found)
    return path


def share_or_path(node: Any) -> Any:
    """`validation.pairs` as given. Raises DiffalignError for what is neither a share of the pairs nor a path."""
    if isinstance(node, str):
        return packaged_asset(node)
    if node is None or (isinstance(node, float) and 0 < node < 1):
        return node
    raise DiffalignError(
        "give a share of the training pairs, a number between 0 and 1 such as 0.1, or the path of other pairs"
    )


def count_or_path(node: Any) -> Any:
    """`validation.guard_prompts` as given. Raises DiffalignError for what is neither a number from 2 nor a path."""
    if isinstance(node, str):
        return packaged_asset(node)
    whole = isinstance(node, int | float) and not isinstance(node, bool) and node == node // 1  # 5e1 is a number too
    if whole and 2 <= node <= MOST:
        return int(node)
    raise DiffalignError(
        "give a number of prompts of the held-out pairs, from 2 on, or a file of prompts or a set of "
        "`diffalign list prompts`"
    )


def check_remote(data: Any, heldout: str | float | None = None, source: Any = None) -> None:
    """Raises DiffalignError for settings that data on a remote store exclude, or that only these have."""
    if not is_remote(data.path):
        if data.shuffle_buffer is not None:
            raise DiffalignError(
                f"data.shuffle_buffer is for remote shards, and data.path is {data.path}, whose pairs are all mixed; "
                "remove it"
            )
        return
    if source is not None:
        raise DiffalignError(
            f"source: {source.name} visits rows of all of {data.path} by turns; copy its prompts or rows here"
        )
    if data.verify != "none":
        raise DiffalignError(f"data.verify: {data.verify} would fetch every shard of {data.path} first; set it to none")
    if data.curriculum is not None:
        raise DiffalignError("data.curriculum visits pairs of all shards by turns; copy the data here, or remove it")
    if data.cache_dir is None and (isinstance(heldout, float) or is_remote(str(heldout))):
        raise DiffalignError(
            "validation.pairs: held-out pairs of remote shards would be fetched at every measurement; set "
            "data.cache_dir, or name local pairs"
        )
