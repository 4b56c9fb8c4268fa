"""The usable pairs of a data set: an index over stored rows, made once; images stay where they are.

The index holds per pair: its row, its id, its prompt (shared between equal prompts), which side is the chosen
one, and two image sizes when they were looked at. Nothing else is in memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor
from tqdm import tqdm

from diffalign.data.cells import image_ref
from diffalign.data.formats.columns import Columns
from diffalign.data.formats.pickapic import Layout
from diffalign.data.row import (
    BAD_ROW,
    DUPLICATE,
    IDENTICAL,
    TIE,
    DataError,
    ImageError,
    ImageRef,
    PairRow,
    Problem,
    check_size,
)
from diffalign.data.spec import Verify
from diffalign.data.table.file_hash import Files, file_stat
from diffalign.data.table.metadata import SmallColumns
from diffalign.data.weights import TERMS, read_mask

log = logging.getLogger(__name__)

MANY_ROWS = 100_000  # above it, looking at every image takes long enough to say how to do without
Size = tuple[int, int]
_INDEX = (
    *("examined_rows", "problems", "ids", "prompts", "names_files", "negative_masks"),
    *("_sizes", "_rows", "_first", "_ties", "_scores"),
)


class PairTable:
    """Usable pairs, in stored order: `len(table)`, `table[i]`, and what was wrong with the other rows."""

    def __init__(self, columns: Columns, layout: Layout, *, keep_ties: bool, invert_preference: bool) -> None:
        self.columns, self.layout = columns, layout
        self.keep_ties, self.invert_preference = keep_ties, invert_preference
        self.format, self.storage = layout.format, columns.storage
        self.total_rows, self.examined_rows = len(columns), 0
        self.problems: list[Problem] = []
        self.ids: list[str] = []
        self.prompts: list[str] = []  # of each pair
        self._sizes = array("i")  # four numbers per pair; empty with verify="none"
        self._files = Files()  # whose contents the ids do not cover
        self._by_file = array("q")  # indices of the pairs that name them
        self._rows, self._first, self._ties = array("q"), bytearray(), bytearray()
        self._scores: list[tuple[float, float]] | None = [] if layout.scores or keep_ties else None
        self._numbers = {part: array("d") for part in layout.terms if TERMS[part] is not None}
        self.names_files = False  # whether an image looked at was a file of its own, beside the stored rows
        self.negative_masks = False  # whether one below 0 was seen; with verify="none" masks are not looked at
        self._users: tuple[Tensor, array[int]] | None = None  # embeddings [user dim], and each pair's row of them

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> PairRow:
        """The pair, images unopened. Raises ImageError when a side is empty in the stored row."""
        row = self._rows[index]
        refs = self.refs(row)
        first = self._first[index]
        return PairRow(
            self.ids[index],
            self.prompts[index],
            refs[first],
            refs[1 - first],
            self.scores(index),
            self.columns.where(row),
            tie=self.tie(index),
        )

    def chosen(self, index: int) -> ImageRef:
        """The chosen image of a pair, unopened. Raises ImageError when a side is empty in the stored row."""
        return self[index].chosen

    def tie(self, index: int) -> bool:
        """Whether a pair is a kept tie; no image is looked at."""
        return bool(self._ties[index])

    def scores(self, index: int) -> tuple[float, float] | None:
        """(chosen, rejected) scores of a pair; nan where the data lack one, None where they have no scores."""
        if self._scores is None:
            return None
        values, first = self._scores[index], self._first[index]
        return values[first], values[1 - first]

    @property
    def terms(self) -> tuple[str, ...]:
        """Which of the terms in `data/weights.py` the data have."""
        return tuple(self.layout.terms)

    def number(self, part: str, index: int) -> float | None:
        """A pair's term that is a number; None where the data have none of that name."""
        return self.numbers(index).get(part)

    def numbers(self, index: int) -> dict[str, float]:
        """The terms of a pair that are numbers, those of them that the data have."""
        return {part: values[index] for part, values in self._numbers.items()}

    def mask(self, index: int) -> Tensor | None:
        """A pair's mask over its whole picture, float64 [H W]; None where the data have none. Raises ImageError."""
        return self._mask(self._rows[index]) if "mask" in self.layout.terms else None

    def _mask(self, row: int) -> Tensor:
        (cell,) = self.columns.cells(row, (self.layout.terms["mask"],))
        return read_mask(cell, self.columns.where(row))

    def take_scores(self, scores: list[tuple[float, float]], *, relabel: bool) -> None:
        """Scores of every pair's images in stored order; with `relabel` they also say which is the chosen one.

        Equal or missing scores leave the label as it is. Raises DataError for relabelling pairs with margins or masks.
        """
        if relabel and {"margin", "mask"} & self.layout.terms.keys():
            raise DataError(
                "margins and masks state by how much, and where, the labelled image is better: they "
                "require the original labels; set relabel to false, or ignore the columns (columns: "
                '{"mask": "", "margin": ""})'
            )
        self._scores = scores
        for index, (one, two) in enumerate(scores) if relabel else ():
            first = (one < two) ^ self.invert_preference
            if (one < two or one > two) and first != self._first[index]:
                self._first[index] = first
                if self._sizes:
                    sizes = self._sizes[4 * index : 4 * index + 4]
                    self._sizes[4 * index : 4 * index + 4] = sizes[2:] + sizes[:2]
            self._ties[index] = self._ties[index] and one == two

    def leave_out(self, kind: str, reasons: Mapping[int, str]) -> None:
        """Take pairs out of the table, by index with the reason for each, which goes to `problems`."""
        for index in sorted(reasons):
            self._report(self._rows[index], kind, reasons[index])
        kept = [index for index in range(len(self)) if index not in reasons]
        by_file, files = set(self._by_file), Files()
        for index in kept:
            if index in by_file:
                refs = self.refs(self._rows[index])
                files.add([str(ref.path) for ref in refs], [file_stat(ref) for ref in refs])
        self._files = files
        self._by_file = array("q", (place for place, index in enumerate(kept) if index in by_file))
        self.ids, self.prompts = [self.ids[i] for i in kept], [self.prompts[i] for i in kept]
        self._sizes = array("i", (x for i in kept for x in self._sizes[4 * i : 4 * i + 4]))
        self._rows = array("q", (self._rows[i] for i in kept))
        self._first, self._ties = (bytearray(flags[i] for i in kept) for flags in (self._first, self._ties))
        self._scores = None if self._scores is None else [self._scores[i] for i in kept]
        self._numbers = {part: array("d", (values[i] for i in kept)) for part, values in self._numbers.items()}
        if self._users is not None:
            self._users = self._users[0], array("q", (self._users[1][i] for i in kept))
        self.__dict__.pop("identity", None)

    def column(self, name: str) -> list[Any]:
        """A small column's value of each pair."""
        values = self.columns.column(name)
        return [values[row] for row in self._rows]

    def take_users(self, embeddings: Tensor, rows: Sequence[int]) -> None:
        """Who preferred: embeddings float32 [user dim], and for each pair the row of its user."""
        self._users = embeddings, array("q", rows)

    def user(self, index: int) -> Tensor | None:
        """The embedding [dim] of a pair's user; None in a table that was not given users."""
        return None if self._users is None else self._users[0][self._users[1][index]]

    @property
    def user_dim(self) -> int | None:
        """Length of the users' embeddings; None without users."""
        return None if self._users is None else int(self._users[0].shape[1])

    def stored(self, index: int) -> tuple[ImageRef, ImageRef]:
        """Both images of a pair, in stored order."""
        return self.refs(self._rows[index])

    def refs(self, row: int) -> tuple[ImageRef, ImageRef]:
        """Both images of a stored row, in stored order."""
        where, names = self.columns.where(row), self.layout.images
        base = self.columns.base(row)
        one, two = (
            image_ref(cell, base, f"{where} {name}") for cell, name in zip(self.columns.cells(row, names), names)
        )
        return one, two

    def where(self, index: int) -> str:
        """The name of a pair's stored row in messages."""
        return self.columns.where(self._rows[index])

    @property
    def sizes(self) -> list[Size]:
        """(width, height) of every image, chosen and rejected in turn; empty with verify="none"."""
        return list(zip(self._sizes[::2], self._sizes[1::2]))

    def require_usable(self) -> None:
        """Raise DataError, with the first reason, when no pair is usable."""
        if not len(self):
            raise DataError(
                f"none of the {self.total_rows} rows is usable; `diffalign data check` shows the reasons "
                f"(first: {self.problems[0] if self.problems else 'no rows'})"
            )

    @property
    def ties(self) -> int:
        """Number of kept ties."""
        return sum(self._ties)

    @property
    def by_file(self) -> Sequence[int]:
        """Indices of the pairs that name image files whose contents their ids do not cover."""
        return self._by_file

    def parts(self) -> dict[str, list[bytes | bytearray | array[Any]]]:
        """What the pairs are besides ids and prompts, as raw numbers by part, for hashing; see `table/identity`."""
        parts: dict[str, list[bytes | bytearray | array[Any]]] = {"sides": [self._first, self._ties]}
        if self._scores is not None:
            parts["scores"] = [array("d", (value for pair in self._scores for value in pair))]
        if self._numbers:
            parts["terms"] = [values for _, values in sorted(self._numbers.items())]
        if self._users is not None:
            parts["users"] = [self._users[0].numpy().tobytes(), self._users[1]]
        if self._by_file:
            parts["sizes"] = [self._files.sizes]
        return parts

    @cached_property
    def identity(self) -> str:
        """Hash of what the pairs are, in their order: ids, prompts, which side is chosen, contents of image files.

        The same however the images were verified. Reads the image files that rows name, unless their hash is
        remembered; raises ImageError when one has gone.
        """
        digest = hashlib.blake2b(digest_size=16)
        for index, name in enumerate(self.ids):
            sides = f"{self._first[index]}{self._ties[index]}"
            digest.update("\x1f".join((name, self.prompts[index], sides, "\x1e")).encode())
        if self._by_file:
            digest.update(self._files.contents(self.refs(self._rows[index]) for index in self._by_file).encode())
        return digest.hexdigest()

    def examine(self, verify: Verify, max_pairs: int | None) -> None:
        """Fill the index and `problems` by one pass over the rows; stop after `max_pairs` usable ones."""
        light = SmallColumns(self.columns, self.layout)
        seen: Counter[str] = Counter()
        kept_prompts: dict[str, str] = {}
        if verify != "none" and self.total_rows >= MANY_ROWS and max_pairs is None:
            log.info("checking the images of all %d rows (verify=%r); verify='none' skips it", self.total_rows, verify)
        bar = tqdm(range(self.total_rows), desc="examining rows", unit=" rows", delay=3.0, mininterval=1.0)
        for row in bar:
            if max_pairs is not None and len(self) >= max_pairs:
                break
            self.examined_rows += 1
            fault = self.columns.fault(row)
            if fault is not None:
                self._report(row, BAD_ROW, fault)
                continue
            judged = light.preferred(row)
            tie = False
            if isinstance(judged, tuple):
                kind, reason = judged
                if kind != TIE or not self.keep_ties:
                    self._report(row, kind, reason)
                    continue
                judged, tie = 0, True
            try:
                prompt, uids = light.prompt(row), light.uids(row)
                numbers = light.numbers(row)
                if "mask" in self.layout.terms and verify != "none":
                    self.negative_masks |= bool((self._mask(row) < 0).any())
                name, sizes, files = self._look(row, prompt, uids, verify)
            except ImageError as error:
                self._report(row, error.kind, str(error))
                continue
            seen[name] += 1
            if seen[name] > 1:
                reason = f"{name} was seen {seen[name] - 1} times before; used as {name}#{seen[name]}"
                self.problems.append(Problem(self.columns.where(row), DUPLICATE, reason, dropped=False))
                name = f"{name}#{seen[name]}"
            first = judged if tie else judged ^ self.invert_preference
            if files is not None:
                self._files.add(*files)
                self._by_file.append(len(self))
            for part, value in numbers.items():
                self._numbers[part].append(value)
            self._rows.append(row)
            self._first.append(first)
            self._ties.append(tie)
            self.ids.append(name)
            self.prompts.append(kept_prompts.setdefault(prompt, prompt))
            if self._scores is not None:
                labels = (0.5, 0.5) if tie else (1.0 - judged, float(judged))
                self._scores.append(light.scores(row) or labels)
            if sizes is not None:
                self._sizes.extend((*sizes[first], *sizes[1 - first]))

    def index(self) -> dict[str, Any]:
        """All that `examine` found, as plain lists, arrays and numbers by name."""
        return {name: getattr(self, name) for name in _INDEX} | {"numbers": self._numbers}

    def take_index(self, found: dict[str, Any]) -> None:
        """Takes what `index` gave for the same rows and settings, in place of examining them."""
        self._numbers = found["numbers"]
        for name in _INDEX:
            setattr(self, name, found[name])

    def _report(self, row: int, kind: str, reason: str) -> None:
        self.problems.append(Problem(self.columns.where(row), kind, reason))

    def _look(
        self, row: int, prompt: str, uids: tuple[str, ...], verify: Verify
    ) -> tuple[str, tuple[Size, Size] | None, tuple[list[str], list[os.stat_result]] | None]:
        """Id and sizes of a row, and its image files where these are not covered by the id (paths and states).

        Whether they are covered does not depend on `verify`. Raises ImageError for the first fault of the images.
        """
        where, base = self.columns.where(row), self.columns.base(row)
        if len(uids) == 2 and uids[0] == uids[1]:
            raise ImageError(IDENTICAL, f"{where}: both sides are image {uids[0]}; replace one or remove the row")
        if uids and verify == "none" and not self.columns.in_memory:  # the cells are not even fetched
            return ":".join(uids), None, None
        refs, files = self.refs(row), None
        self.names_files |= any(ref.path is not None and ref.span is None for ref in refs)
        by_path = base is not None and all(ref.path is not None and ref.span is None for ref in refs)
        if by_path:
            paths, stats = [str(ref.path) for ref in refs], [file_stat(ref) for ref in refs]
            if self.columns.in_memory or not uids:
                files = paths, stats
            names = [os.path.relpath(path, base).replace(os.sep, "/") for path in paths]
            name = ":".join(uids) or _digest(prompt, *names)
            same = names[0] == names[1] or (
                verify != "none" and stats[0].st_size == stats[1].st_size and refs[0].read() == refs[1].read()
            )
        elif uids and verify == "none":
            return ":".join(uids), None, None
        else:
            first, second = (ImageRef(ref.read(), None, ref.where) for ref in refs)
            refs = first, second
            same = refs[0].data == refs[1].data
            name = ":".join(uids) or _digest(prompt, *(ref.data or b"" for ref in refs))
        if same:
            raise ImageError(IDENTICAL, f"{where}: both sides are the same image; replace one or remove the row")
        if verify == "none":
            return name, None, files
        sizes = []
        for ref in refs:
            sizes.append(ref.open().size if verify == "full" else ref.size())
            check_size(sizes[-1], ref.where)
        return name, (sizes[0], sizes[1]), files


def _digest(prompt: str, *parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (prompt, *parts):
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()
