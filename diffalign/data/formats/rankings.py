"""Rows with several ranked images each, as pairs and as whole lists: the same file serves both.

    {"prompt": …, "images": ["a.png", "b.png", "c.png"], "ranking": [2, 1, 3]}     1 is the best
    {"prompt": …, "images": [{"bytes": …}, …],           "scores":  [.1, .9, .3]}  higher is better

HPDv2's names for these are image_path or file_path, and rank or human_preference. A jsonl or parquet file, a saved data
set and HPDv2's json can have such rows.

As pairs, every two images of a row are one, with the row's weight, margin and mask; `RankedColumns.only` chooses some.
As lists, `table/lists.py` reads `RankedColumns.lists`, for objectives that compare whole lists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from diffalign.data.cells import Absent
from diffalign.data.formats import pickapic, preference
from diffalign.data.formats.columns import Columns
from diffalign.data.row import DataError

IMAGES = ("images", "image_path", "file_path")
LOWER, HIGHER = ("ranking", "rank"), ("scores", "human_preference")  # is better
ORDERS = (*LOWER, *HIGHER)
PARTS = ("images", "ranking", "scores")  # of a config's `data.columns`, besides those of pairs
SIDES = ("image_0", "image_1")
OF_PAIRS = [(pickapic.PARTS[SIDES[0]], pickapic.PARTS[SIDES[1]])]  # the columns of either image
OF_PAIRS += [(preference.PARTS["chosen"], preference.PARTS["rejected"])]
NEEDED = "one of ranking, rank (1 is the best), scores or human_preference (higher is better), a number for each image"


class RankedColumns:
    """The pairs of rows with several ranked images."""

    files: Sequence[Path] = ()  # so no note of examined rows, which would not know the choice

    orders: Sequence[str] = ()  # the columns that the order could be read from; it is read from the first

    def __init__(
        self, lists: Columns, images: str, ranks: Sequence[Any], faults: Mapping[int, str], choice: str = "all"
    ) -> None:
        """lists: the rows. images: their column of images. ranks: of each row, as `ranks_of` gives them."""
        self.lists, self.images, self.ranks, self.faults = lists, images, ranks, faults
        self.storage, self.in_memory = lists.storage, lists.in_memory
        gone = {images, *ORDERS, *(name for sides in OF_PAIRS for names in sides for name in names)}
        self.names = (*(n for n in lists.names if n not in gone), *SIDES, "label_0", "label_1")
        self.choice = choice

    @cached_property
    def pairs(self) -> list[tuple[int, tuple[int, int] | None]]:
        """Row and places of each pair; made when pairs are asked for, since lists need none."""
        return [
            (row, pair)
            for row, found in enumerate(self.ranks)
            for pair in ([None] if row in self.faults else pairs_of(found, self.choice))
        ]

    def only(self, choice: str) -> RankedColumns:
        """The pairs of one choice of `spec.PairsOfRanking`, and the rows with a fault."""
        return RankedColumns(self.lists, self.images, self.ranks, self.faults, choice)

    def __len__(self) -> int:
        return len(self.pairs)

    def column(self, name: str) -> list[Any]:
        if name in ("label_0", "label_1"):
            return [None if pair is None else self._labels(row, pair)[int(name[-1])] for row, pair in self.pairs]
        values = self.lists.column(name)
        return [values[row] for row, _ in self.pairs]

    def cells(self, row: int, names: Sequence[str]) -> list[Any]:
        place, pair = self.pairs[row]
        assert pair is not None, "a row with a fault is not looked at"
        found = images_in(self.lists, place, self.images, len(self.ranks[place])) if set(SIDES) & set(names) else []
        return [
            found[pair[SIDES.index(name)]] if name in SIDES else self.lists.cells(place, (name,))[0] for name in names
        ]

    def where(self, row: int) -> str:
        place, pair = self.pairs[row]
        return self.lists.where(place) + ("" if pair is None else f" images {pair[0]}, {pair[1]}")

    def fault(self, row: int) -> str | None:
        place, pair = self.pairs[row]
        return self.faults.get(place) if pair is None else None

    def base(self, row: int) -> Path | None:
        return self.lists.base(self.pairs[row][0])

    def _labels(self, row: int, pair: tuple[int, int]) -> tuple[Any, Any]:
        one, two = (self.ranks[row][i] for i in pair)
        if not all(map(is_number, (one, two))):
            # a bad label, which drops the pair with this value in the reason; "1" and true are none either
            one, two = (x if x is None or isinstance(x, float) else repr(x) for x in (one, two))
            return one, math.nan if two is None else two  # without label_1 it would follow from label_0
        label = 0.5 if one == two else float(one < two)
        return label, 1 - label


def ranked(stored: Columns, columns: Mapping[str, str] | None = None) -> RankedColumns | None:
    """Rows with lists of ranked images; None for any other rows.

    columns: names of the parts `images`, `ranking` and `scores` where they are others. Raises DataError for such a name
    that the rows do not have.
    """
    if isinstance(stored, RankedColumns):
        stored = stored.lists
    given = {part: name for part, name in (columns or {}).items() if part in PARTS}
    if not given and has_pairs((*stored.names, *(columns or ()))):
        return None  # pairs, with columns besides that happen to be called as those of rankings
    for part, name in given.items():
        if name not in stored.names:
            raise DataError(f"columns maps {part} to {name!r}, and {stored.storage} has {', '.join(stored.names)}")
    images = given.get("images") or next((name for name in IMAGES if name in stored.names), None)
    if {"ranking", "scores"} <= given.keys():
        raise DataError(
            f"columns names ranking {given['ranking']!r} (lower is better) and scores {given['scores']!r} (higher is "
            "better), and images have one order; name one of them"
        )
    orders = [name for name in (given.get("ranking"), given.get("scores")) if name]
    orders = orders or [name for name in ORDERS if name in stored.names]
    if images is None or not orders:
        return None
    higher = orders[0] in HIGHER or orders[0] == given.get("scores")
    values = [ranks_of(value, higher=higher) for value in stored.column(orders[0])]
    faults = {row: fault for row in range(len(stored)) if (fault := stored.fault(row) or _fault(values[row]))}
    if stored.in_memory:
        for row, cell in enumerate(stored.column(images)):
            if row not in faults and not isinstance(cell, list | tuple):
                faults[row] = f"{images} is {cell!r:.60}; write a list of images"
            elif row not in faults and len(cell) != len(values[row]):
                faults[row] = f"{len(cell)} {images} for {len(values[row])} numbers of {orders[0]}; each image has one"
    found = RankedColumns(stored, images, values, faults)
    found.orders = orders
    return found


def has_pairs(names: Iterable[str]) -> bool:
    """Whether columns, or the parts of `data.columns`, have both images of a pair."""
    there = set(names)
    return any(there & set(one) and there & set(two) for one, two in OF_PAIRS)


def ranks_of(values: Any, *, higher: bool) -> Any:
    """The numbers of a row so that lower is better; what is no list, and what in it is no number, stays as it is."""
    if callable(tolist := getattr(values, "tolist", None)):  # numpy, torch
        values = tolist()
    if not isinstance(values, list | tuple):
        return values
    values = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    return [-value if higher and is_number(value) else value for value in values]


def _fault(ranks: Any) -> str | None:
    """Why a row's order cannot be used, or None."""
    if not isinstance(ranks, list):
        return f"its order is {ranks!r:.60}; required: {NEEDED}"
    return None if len(ranks) > 1 else f"{len(ranks)} ranked images; a ranking has at least two"


def pairs_of(ranks: Sequence[Any], choice: str) -> list[tuple[int, int]]:
    """Pairs of a row's images, the first in the file first; of equally good images the first is best, the last worst.

    A row whose ranks are not all numbers has all its pairs: they are dropped, with the reason.
    """
    every = list(combinations(range(len(ranks)), 2))
    if choice == "all" or not all(map(is_number, ranks)):
        return every if choice == "all" else []
    best_first = sorted(range(len(ranks)), key=lambda i: (ranks[i], i))
    some = [(best_first[0], best_first[-1])] if choice == "best_worst" else list(pairwise(best_first))
    return [pair for pair in every if pair in some or pair[::-1] in some]


def is_number(value: Any) -> bool:
    """Whether a value can be compared: an int that is no bool, or a finite float."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


def images_in(lists: Columns, row: int, images: str, count: int) -> list[Any]:
    """The image cells of a row, `count` of them; where the row has another number, all are `Absent` with the reason."""
    (cell,) = lists.cells(row, (images,))
    if isinstance(cell, list | tuple) and len(cell) == count:
        return list(cell)
    found = f"{len(cell)} images" if isinstance(cell, list | tuple) else f"{cell!r:.60}"
    return [Absent(f"{images} has {found} for {count} ranks; each image has one")] * count


def write_rankings(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows of prompt, images (encoded) and ranking (1 is the best) as parquet.

    A few rows are in memory at a time; the file appears complete or not at all.
    """
    import pyarrow as pa

    from diffalign.data.formats.parquet import write_rows

    columns = {"prompt": pa.string(), "images": pa.list_(pa.binary()), "ranking": pa.list_(pa.int64())}
    write_rows(file, columns, rows)
