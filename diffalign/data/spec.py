"""`DataSpec`: which rows of a data set are pairs, and how its columns are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from diffalign.data.row import DataError

PairsOfRanking = Literal["all", "best_worst", "adjacent"]
Verify = Literal["none", "header", "full"]


@dataclass(frozen=True)
class DataSpec:
    """How rows are read as pairs; fields as in a config's `data` section. Raises DataError for an unknown `verify`."""

    format: str = (
        "auto"  # column layout: pickapic, preference or two_prompts; auto takes the one whose columns are there
    )
    split: str = "train"  # for data sets and parquet folders that have splits
    # part -> column for data with other names, e.g. {"prompt": "text", "chosen": "winner"}; an optional part with an
    # empty name is left out although the data have its column, e.g. {"weight": ""}
    columns: Mapping[str, str] = field(default_factory=dict)
    max_pairs: int | None = None  # stop after this many usable pairs
    invert_preference: bool = False  # swap chosen and rejected
    pairs_of_ranking: PairsOfRanking = "all"  # of several ranked images: all pairs, the best with the worst, neighbours
    lists: bool = False  # read rankings as whole lists, for an objective that compares lists; pairs are lists of two
    keep_ties: bool = False  # include rows labelled 0.5/0.5; without score columns the labels become the scores
    verify: Verify = "header"  # none opens no image, header reads type and size of each, full decodes each

    def __post_init__(self) -> None:
        if self.verify not in ("none", "header", "full"):
            raise DataError(f"verify={self.verify!r}; allowed are 'none', 'header' and 'full'")
        if self.pairs_of_ranking not in get_args(PairsOfRanking):
            raise DataError(
                f"pairs_of_ranking={self.pairs_of_ranking!r}; allowed are {', '.join(get_args(PairsOfRanking))}"
            )


AS_FOUND = DataSpec()


def is_remote(path: str) -> bool:
    """Whether a path is the URL of a store."""
    return "://" in path
