"""Ranked lists of images as they are, for objectives that compare whole lists (`Objective.compares` = "lists").

A list is one prompt with 2 to 8 images in one order. It takes the place of a pair everywhere: one row of the table, one
id, one prompt, one weight and mask, one draw of t and noise. Its sides are its images, the best first. A table of pairs
is a table of lists of two, so such an objective also trains on pairs.

Left out: margins, which are of two images; scores of a scorer's file; and lists with equally good images.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from diffalign.data.buckets.sizes import Shapes
from diffalign.data.cells import image_ref
from diffalign.data.formats.columns import Columns
from diffalign.data.formats.pickapic import Layout
from diffalign.data.formats.rankings import RankedColumns, images_in, is_number
from diffalign.data.row import (
    BAD_LABEL,
    BAD_ROW,
    IDENTICAL,
    TIE,
    DataError,
    ImageError,
    ImageRef,
    PairRow,
    Problem,
    check_size,
)
from diffalign.data.spec import DataSpec
from diffalign.data.table.examine import Index, SmallColumns, digest_of, is_own_file, stored_mask
from diffalign.data.table.file_hash import file_stat
from diffalign.data.table.pairs import PairTable
from diffalign.data.weights import TERMS
from diffalign.types import LONGEST_LIST


class ListTable(PairTable):
    """Usable ranked lists, in stored order; `table[i].images` are those of a list, the best first."""

    def __init__(self, columns: RankedColumns, layout: Layout, index: Index, *, invert_preference: bool) -> None:
        super().__init__(columns.lists, layout, index, invert_preference=invert_preference)
        self.images = columns.images

    def __getitem__(self, index: int) -> PairRow:
        """The list, images unopened. Raises ImageError when one is empty in the stored row."""
        refs, order = self.stored(index), self.index.orders[index]
        best, second, *others = (refs[place] for place in order)
        return PairRow(
            self.ids[index], self.prompts[index], best, second, None, self.where(index), others=tuple(others)
        )

    def count(self, index: int) -> int:
        """How many images a list has."""
        return len(self.index.orders[index])

    def stored(self, index: int) -> tuple[ImageRef, ...]:
        """All images of a list, in stored order. Raises ImageError when one is empty in the stored row."""
        return stored_list(self.columns, self.images, self.index.rows[index], self.count(index))

    def take_scores(self, scores: list[tuple[float, float]], *, relabel: bool) -> None:
        """Raises DataError: files of scores are of pairs."""
        raise DataError(
            "data.scores: these are ranked lists, and files of scores are of pairs; put the scores into the lists "
            "themselves (scores, higher is better), or use an objective of pairs"
        )

    def parts(self) -> dict[str, list[bytes | bytearray | array[Any]]]:
        """The lists besides ids and prompts, for hashing: of pairs the chosen side, of lists the whole order."""
        orders = bytes(place for order in self.index.orders for place in (*order, 255))
        return {**super().parts(), "sides": [orders]}

    def _identity(self, index: int) -> str:
        return f"list {self.index.orders[index]}"


def open_lists(columns: RankedColumns, layout: Layout, spec: DataSpec) -> ListTable:
    """The usable lists of rows with rankings; `.problems` names every other row."""
    images_alone = replace(layout, labels=(None, None), has_label=None, uids=(), scores=None)
    index = examine_lists(columns, images_alone, spec)
    return ListTable(columns, images_alone, index, invert_preference=spec.invert_preference)


def examine_lists(columns: RankedColumns, layout: Layout, spec: DataSpec) -> Index:
    """Examines the rows, in order, until there are `spec.max_pairs` usable lists."""
    lists, seen = columns.lists, Counter[str]()
    ids: list[str] = []
    prompts: list[str] = []
    numbers = {part: array("d") for part in layout.terms if TERMS[part] is not None}
    small, index = SmallColumns(lists, layout), Index(ids=ids, prompts=prompts, numbers=numbers)
    for row in range(len(lists)):
        if spec.max_pairs is not None and len(ids) >= spec.max_pairs:
            break
        index.examined_rows += 1
        try:
            order = _order(columns, row, spec.invert_preference)
            prompt, values = small.prompt(row), small.numbers(row)
            if "mask" in layout.terms and spec.verify != "none":
                index.negative_masks |= bool((stored_mask(lists, layout, row) < 0).any())
            refs = stored_list(lists, columns.images, row, len(order))
            name, sizes = _examined(lists, row, refs, spec, prompt)
        except ImageError as error:
            index.problems.append(Problem(lists.where(row), error.kind, str(error)))
            continue
        name = index.own_name(name, seen, lists.where(row))
        if all(map(is_own_file, refs)):
            index.names_files = True
            index.files.add([str(ref.path) for ref in refs], [file_stat(ref) for ref in refs])
            index.by_file.append(len(ids))
        ids.append(name)
        prompts.append(prompt)
        index.rows.append(row)
        index.orders.append(order)
        index.first.append(0)
        index.ties.append(False)
        for part, value in values.items():
            index.numbers[part].append(value)
        for place in order[:2] if sizes else ():
            index.sizes.extend(sizes[place])
    return index


def stored_list(lists: Columns, images: str, row: int, count: int) -> tuple[ImageRef, ...]:
    """All images of a stored row. Raises ImageError where one is missing, or the row has another number of them."""
    where, base = lists.where(row), lists.base(row)
    cells = images_in(lists, row, images, count)
    return tuple(image_ref(cell, base, f"{where} image {i}") for i, cell in enumerate(cells))


def _order(columns: RankedColumns, row: int, invert: bool) -> tuple[int, ...]:
    """The places of a row's images, the best first. Raises ImageError for a row that is no ranked list."""
    where, ranks = columns.lists.where(row), columns.ranks[row]
    if (fault := columns.faults.get(row)) is not None:
        raise ImageError(BAD_ROW, fault)
    if len(ranks) > LONGEST_LIST:
        raise ImageError(
            BAD_ROW,
            f"{where}: {len(ranks)} images, and a list has at most {LONGEST_LIST}; split it, or train on its pairs "
            "with an objective like dpo",
        )
    if bad := [value for value in ranks if not is_number(value)]:
        raise ImageError(BAD_LABEL, f"{where}: the order has {bad[0]!r:.60}; write a finite number for each image")
    best_first = sorted(range(len(ranks)), key=lambda i: (ranks[i], i))
    for one, two in pairwise(best_first):
        if ranks[one] == ranks[two]:
            raise ImageError(
                TIE,
                f"{where}: images {one} and {two} are equally good, and a list has one order; leave one of them out, "
                "or train on its pairs with an objective like dpo, which leaves ties out",
            )
    return tuple(best_first[::-1] if invert else best_first)


def _examined(
    lists: Columns, row: int, refs: Sequence[ImageRef], spec: DataSpec, prompt: str
) -> tuple[str, list[tuple[int, int]]]:
    """The id of a list, and its images' sizes unless they are not read. Raises ImageError for its first fault."""
    base, where = lists.base(row), lists.where(row)
    parts: list[str | bytes]
    if base is not None and all(map(is_own_file, refs)):
        parts = [os.path.relpath(str(ref.path), base).replace(os.sep, "/") for ref in refs]
        lengths_of = [file_stat(ref).st_size for ref in refs]
        same: list[Any] = [*parts]
        if spec.verify != "none":  # files of different lengths differ, and are not read
            alike = [length for length, files in Counter(lengths_of).items() if files > 1]
            same = [
                hashlib.blake2b(ref.read()).digest() if length in alike else part
                for ref, length, part in zip(refs, lengths_of, parts)
            ]
    else:
        parts = [ref.read() for ref in refs]
        same = [*parts]
    for i, one in enumerate(same):
        if one in same[:i]:
            raise ImageError(
                IDENTICAL, f"{where}: images {same.index(one)} and {i} are the same image; replace one or remove it"
            )
    sizes = []
    for ref in refs if spec.verify != "none" else ():
        sizes.append(ref.open().size if spec.verify == "full" else ref.size())
        check_size(sizes[-1], ref.where)
    return digest_of(prompt, *parts), sizes


def not_lists(table: PairTable, path: str, instead: str) -> None:
    """Raises DataError for pairs that come from lists of more than two images, which would be lost."""
    columns = table.columns
    if isinstance(columns, RankedColumns) and any(isinstance(r, list) and len(r) > 2 for r in columns.ranks):
        raise DataError(f"{path} has ranked lists, and this command reads pairs and would lose the lists; {instead}")


def count_lists(columns: RankedColumns) -> tuple[Counter[int], Counter[str]]:
    """The rows that have one order by their number of images, and the others by kind of fault; images are not read."""
    usable, others = Counter[int](), Counter[str]()
    for row in range(len(columns.lists)):
        try:
            usable[len(_order(columns, row, False))] += 1
        except ImageError as error:
            others[error.kind] += 1
    return usable, others


def lengths(table: PairTable) -> Counter[int]:
    """How many lists have how many images."""
    return Counter(table.count(index) for index in range(len(table)))


def counted_lengths(table: PairTable) -> str:
    """How many lists have how many images, for messages: "30 of 3, 12 of 4 images"."""
    return ", ".join(f"{lists} of {length}" for length, lists in sorted(lengths(table).items())) + " images"


def by_length(table: PairTable, resolution: int) -> Shapes | None:
    """Squares, sorted by the length of their lists, so that a micro-batch has lists of one; None where all have one."""
    found = sorted(lengths(table))
    if len(found) < 2:
        return None
    kinds = {length: place for place, length in enumerate(found)}
    bucket = array("i", (kinds[table.count(index)] for index in range(len(table))))
    return Shapes("", ((resolution, resolution),) * len(found), bucket)
