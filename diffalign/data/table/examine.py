"""One pass over stored rows: which are usable pairs, and the reason for each that is not.

The small columns (prompts, labels, ids, scores, weights and margins) are read at once, images one row at a time.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from diffalign.data.cells import image_ref, read_prompt
from diffalign.data.formats.columns import Columns
from diffalign.data.formats.pickapic import Layout, judge
from diffalign.data.formats.text_files import odd
from diffalign.data.row import BAD_ROW, DUPLICATE, IDENTICAL, TIE, ImageError, ImageRef, Problem, check_size
from diffalign.data.spec import DataSpec, Verify
from diffalign.data.table.file_hash import Files, file_stat
from diffalign.data.table.texts import Texts, hash_texts
from diffalign.data.weights import TERMS, Number, read_mask
from diffalign.io.progress import Progress

log = logging.getLogger(__name__)

MANY_ROWS = 100_000  # above it, reading every image takes long enough to say how to do without


@dataclass
class Index:
    """The usable pairs, in stored order, and the problems of the other rows. Images stay where they are."""

    examined_rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    ids: Sequence[str] = field(default_factory=list)  # `Texts` in a large table
    prompts: Sequence[str] = field(default_factory=list)  # equal prompts are one object
    rows: array[int] = field(default_factory=lambda: array("q"))  # the stored row of each pair
    first: bytearray = field(default_factory=bytearray)  # which of its two stored images is the chosen one
    ties: bytearray = field(default_factory=bytearray)
    scores: list[tuple[float, float]] | None = None  # in stored order
    numbers: dict[str, array[float]] = field(default_factory=dict)  # the terms that are numbers
    sizes: array[int] = field(default_factory=lambda: array("i"))  # four numbers per pair; none with verify="none"
    orders: list[tuple[int, ...]] = field(default_factory=list)  # of ranked lists: the stored images, best first
    names_files: bool = False  # whether an image is a file of its own, beside the stored rows
    negative_masks: bool = False  # whether a mask has a value below 0; with verify="none" masks are not read
    files: Files = field(default_factory=Files)  # image files whose contents the ids do not cover
    by_file: array[int] = field(default_factory=lambda: array("q"))  # places of the pairs that name them
    hashes: dict[str, str] = field(default_factory=dict)  # of all ids and all prompts, where they are packed

    def own_name(self, name: str, seen: Counter[str], where: str) -> str:
        """The name of a row, with #2, #3 … where earlier ones have it, which is a problem; `seen` counts them."""
        seen[name] += 1
        if seen[name] == 1:
            return name
        own = f"{name}#{seen[name]}"
        reason = f"{name} was seen {seen[name] - 1} times before; used as {own}"
        self.problems.append(Problem(where, DUPLICATE, reason, dropped=False))
        return own

    def select(self, places: Sequence[int]) -> Index:
        """Some of the pairs, with the same problems; `files`, `by_file` and `hashes` are empty."""
        return replace(
            self,
            ids=_some(self.ids, places),
            prompts=_some(self.prompts, places),
            rows=array("q", (self.rows[i] for i in places)),
            first=bytearray(self.first[i] for i in places),
            ties=bytearray(self.ties[i] for i in places),
            scores=None if self.scores is None else [self.scores[i] for i in places],
            numbers={part: array("d", (values[i] for i in places)) for part, values in self.numbers.items()},
            sizes=array("i", (x for i in places for x in self.sizes[4 * i : 4 * i + 4])),
            orders=[self.orders[i] for i in places] if self.orders else [],
            files=Files(),
            by_file=array("q"),
            hashes={},
        )

    def pack(self) -> None:
        """Puts ids and prompts into blocks of bytes, which take less memory, and notes their hashes."""
        self.ids, self.prompts = Texts.of(self.ids), Texts.of(self.prompts)
        self.hashes = {"ids": hash_texts(self.ids), "prompts": hash_texts(self.prompts)}


def _some(texts: Sequence[str], places: Sequence[int]) -> Sequence[str]:
    return texts.select(places) if isinstance(texts, Texts) else [texts[i] for i in places]


class SmallColumns:
    """The values of a row besides its images."""

    def __init__(self, columns: Columns, layout: Layout) -> None:
        def read(name: str | None) -> Any:
            return None if name is None else columns.column(name)

        self._prompt_column, self._prompts = layout.prompt, columns.column(layout.prompt)
        self._labels = [read(name) for name in layout.labels]
        self._has_label = read(layout.has_label)
        self._uids = [columns.column(name) for name in layout.uids]
        self._scores = [columns.column(name) for name in layout.scores or ()]
        self._numbers: dict[str, tuple[Number, Any]] = {
            part: (number, read(layout.terms[part]))
            for part, number in TERMS.items()
            if number is not None and part in layout.terms
        }
        self._where = columns.where

    def prompt(self, row: int) -> str:
        """Raises ImageError (empty prompt, bad prompt)."""
        return read_prompt(self._prompts[row], self._prompt_column)

    def preferred(self, row: int, keep_ties: bool) -> int | None:
        """Index of the preferred image, None for a tie. Raises ImageError (bad label, no label, tie)."""
        one, two = self._labels
        if one is None:
            return 0
        # an absent second column means 1 - label_0; an empty cell in a present one is a bad label
        second = None if two is None else (math.nan if two[row] is None else two[row])
        judged = judge(one[row], second, True if self._has_label is None else self._has_label[row])
        if isinstance(judged, int):
            return judged
        kind, reason = judged
        if kind == TIE and keep_ties:
            return None
        raise ImageError(kind, reason)

    def uids(self, row: int) -> tuple[str, ...]:
        """Raises ImageError for one that is not text (bad row), and for two that are equal (identical images)."""
        cells = [column[row] for column in self._uids]
        values = tuple("" if cell is None or cell != cell else str(cell) for cell in cells)
        if fault := next(filter(None, map(odd, values)), None):
            raise ImageError(BAD_ROW, f"its uid {fault}: {values!a:.80}; write a string in UTF-8, or leave it empty")
        if len(values) == 2 and values[0] and values[0] == values[1]:
            where = self._where(row)
            raise ImageError(IDENTICAL, f"{where}: both sides are image {values[0]}; replace one or remove the row")
        return values if all(values) else ()

    def scores(self, row: int) -> tuple[float, float] | None:
        """Scores in stored order; nan where one is missing; None where the data have no score columns."""
        if not self._scores:
            return None
        one, two = (_score(column[row]) for column in self._scores)
        return one, two

    def numbers(self, row: int) -> dict[str, float]:
        """The terms that are numbers, those of them that the data have. Raises ImageError."""
        where = self._where(row)
        return {part: number.read(column[row], part, where) for part, (number, column) in self._numbers.items()}


def examine(columns: Columns, layout: Layout, spec: DataSpec) -> Index:
    """Examines the rows, in order, until there are `spec.max_pairs` usable ones."""
    small, seen = SmallColumns(columns, layout), Counter[str]()
    ids: list[str] = []
    prompts: list[str] = []
    index = Index(
        ids=ids,
        prompts=prompts,
        scores=[] if layout.scores or spec.keep_ties else None,
        numbers={part: array("d") for part in layout.terms if TERMS[part] is not None},
    )
    unique: dict[str, str] = {}
    if spec.verify != "none" and len(columns) >= MANY_ROWS and spec.max_pairs is None:
        log.info("checking the images of all %d rows (verify=%r); verify='none' skips it", len(columns), spec.verify)
    for row in Progress(range(len(columns)), desc="examining rows", unit=" rows", delay=3.0, mininterval=1.0):
        if spec.max_pairs is not None and len(ids) >= spec.max_pairs:
            break
        index.examined_rows += 1
        try:
            if (fault := columns.fault(row)) is not None:
                raise ImageError(BAD_ROW, fault)
            preferred = small.preferred(row, spec.keep_ties)
            prompt, uids, numbers = small.prompt(row), small.uids(row), small.numbers(row)
            if "mask" in layout.terms and spec.verify != "none":
                index.negative_masks |= bool((stored_mask(columns, layout, row) < 0).any())
            found = _Images(":".join(uids))
            if not uids or spec.verify != "none" or columns.in_memory:  # else the cells are not even fetched
                refs = stored_images(columns, layout, row)
                index.names_files |= any(map(is_own_file, refs))
                found = _examine_images(columns, row, refs, spec.verify, prompt, uids)
        except ImageError as error:
            index.problems.append(Problem(columns.where(row), error.kind, str(error)))
            continue
        name = index.own_name(found.name, seen, columns.where(row))
        if found.files is not None:
            index.files.add(*found.files)
            index.by_file.append(len(ids))
        first = 0 if preferred is None else preferred ^ spec.invert_preference
        index.rows.append(row)
        index.first.append(first)
        index.ties.append(preferred is None)
        ids.append(name)
        prompts.append(unique.setdefault(prompt, prompt))
        for part, value in numbers.items():
            index.numbers[part].append(value)
        if index.scores is not None:
            labels = (0.5, 0.5) if preferred is None else (1.0 - preferred, float(preferred))
            index.scores.append(small.scores(row) or labels)
        for size in (found.sizes[first], found.sizes[1 - first]) if found.sizes else ():
            index.sizes.extend(size)
    return index


def stored_images(columns: Columns, layout: Layout, row: int) -> tuple[ImageRef, ImageRef]:
    """Both images of a stored row, in stored order. Raises ImageError when a side is empty."""
    where, names, base = columns.where(row), layout.images, columns.base(row)
    one, two = (image_ref(cell, base, f"{where} {name}") for cell, name in zip(columns.cells(row, names), names))
    return one, two


def stored_mask(columns: Columns, layout: Layout, row: int) -> Tensor:
    """The mask of a stored row over its whole image, float64 [H W]. Raises ImageError."""
    (cell,) = columns.cells(row, (layout.terms["mask"],))
    return read_mask(cell, columns.where(row))


@dataclass(frozen=True)
class _Images:
    """The id of a row, the sizes of its images in stored order, and files whose contents the id does not cover."""

    name: str
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height); none with verify="none"
    files: tuple[list[str], list[os.stat_result]] | None = None


def is_own_file(ref: ImageRef) -> bool:
    return ref.path is not None and ref.span is None


def _examine_images(
    columns: Columns, row: int, refs: tuple[ImageRef, ImageRef], verify: Verify, prompt: str, uids: tuple[str, ...]
) -> _Images:
    """Whether the id covers the files does not depend on `verify`. Raises ImageError for the images' first fault."""
    base, files = columns.base(row), None
    if base is not None and all(map(is_own_file, refs)):
        paths, stats = [str(ref.path) for ref in refs], [file_stat(ref) for ref in refs]
        if columns.in_memory or not uids:
            files = paths, stats
        parts: list[str | bytes] = [os.path.relpath(path, base).replace(os.sep, "/") for path in paths]
        same = parts[0] == parts[1] or (
            verify != "none" and stats[0].st_size == stats[1].st_size and refs[0].read() == refs[1].read()
        )
    elif uids and verify == "none":
        return _Images(":".join(uids))
    else:
        refs = ImageRef(refs[0].read(), None, refs[0].where), ImageRef(refs[1].read(), None, refs[1].where)
        parts = [ref.data or b"" for ref in refs]
        same = parts[0] == parts[1]
    if same:
        where = columns.where(row)
        raise ImageError(IDENTICAL, f"{where}: both sides are the same image; replace one or remove the row")
    sizes = []
    for ref in refs if verify != "none" else ():
        sizes.append(ref.open().size if verify == "full" else ref.size())
        check_size(sizes[-1], ref.where)
    return _Images(":".join(uids) or digest_of(prompt, *parts), tuple(sizes), files)


def digest_of(prompt: str, *parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (prompt, *parts):
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()


def _score(value: Any) -> float:
    """A finite number, or nan."""
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return score if math.isfinite(score) else math.nan
