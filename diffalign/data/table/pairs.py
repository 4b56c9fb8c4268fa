"""The usable pairs of a data set: an index over stored rows; images stay where they are.

`examine.py` makes the index, once. A table adds scores and users from other files.
"""

from __future__ import annotations

import copy
import hashlib
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from diffalign.data.formats.columns import Columns
from diffalign.data.formats.pickapic import Layout
from diffalign.data.row import DataError, ImageRef, PairRow, Problem
from diffalign.data.table.examine import Index, stored_images, stored_mask
from diffalign.data.table.file_hash import file_stat
from diffalign.data.transforms import Size


class PairTable:
    """Usable pairs, in stored order: `len(table)`, `table[i]`; `problems` names the other rows with the reasons."""

    def __init__(self, columns: Columns, layout: Layout, index: Index, *, invert_preference: bool = False) -> None:
        self.columns, self.layout, self.invert_preference = columns, layout, invert_preference
        self.format, self.storage, self.total_rows = layout.format, columns.storage, len(columns)
        self._users: tuple[Tensor, array[int]] | None = None  # embeddings [user dim], and each pair's row of them
        self.heldout: PairTable | None = None  # pairs that a run on this table measures and does not train on
        self._take(index)

    def _take(self, index: Index) -> None:
        self.index = index
        self.problems, self.ids, self.prompts = index.problems, index.ids, index.prompts
        self.__dict__.pop("identity", None)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> PairRow:
        """The pair, images unopened. Raises ImageError when a side is empty in the stored row."""
        refs, first = self.stored(index), self.index.first[index]
        return PairRow(
            self.ids[index],
            self.prompts[index],
            refs[first],
            refs[1 - first],
            self.scores(index),
            self.where(index),
            tie=self.tie(index),
        )

    def chosen(self, index: int) -> ImageRef:
        """The chosen image of a pair, unopened. Raises ImageError when a side is empty in the stored row."""
        return self[index].chosen

    def count(self, index: int) -> int:
        """How many images a pair has; `lists.ListTable` has more."""
        return 2

    def _identity(self, index: int) -> str:
        """Which side is which, for `identity`."""
        return f"{self.index.first[index]}{self.index.ties[index]}"

    def tie(self, index: int) -> bool:
        """Whether a pair is a tie."""
        return bool(self.index.ties[index])

    def scores(self, index: int) -> tuple[float, float] | None:
        """(chosen, rejected) scores of a pair; nan where the data lack one, None where they have no scores."""
        if self.index.scores is None:
            return None
        values, first = self.index.scores[index], self.index.first[index]
        return values[first], values[1 - first]

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms that the data have; see `data/weights.py`."""
        return tuple(self.layout.terms)

    @property
    def negative_masks(self) -> bool:
        """Whether a mask has a value below 0; with verify="none" masks were not read."""
        return self.index.negative_masks

    def number(self, part: str, index: int) -> float | None:
        """A pair's term that is a number; None where the data have none of that name."""
        return self.numbers(index).get(part)

    def numbers(self, index: int) -> dict[str, float]:
        """The terms of a pair that are numbers, those of them that the data have."""
        return {part: values[index] for part, values in self.index.numbers.items()}

    def mask(self, index: int) -> Tensor | None:
        """A pair's mask over its whole image, float64 [H W]; None where the data have none. Raises ImageError."""
        return stored_mask(self.columns, self.layout, self.index.rows[index]) if "mask" in self.layout.terms else None

    def take_scores(self, scores: list[tuple[float, float]], *, relabel: bool) -> None:
        """Scores of every pair's images in stored order; with `relabel` they also decide which is the chosen one.

        Equal or missing scores leave the label as it is. Raises DataError for relabelling pairs with margins or masks.
        """
        if relabel and {"margin", "mask"} & self.layout.terms.keys():
            raise DataError(
                "margins and masks state by how much, and where, the labelled image is better: they "
                "require the original labels; set relabel to false, or ignore the columns (columns: "
                '{"mask": "", "margin": ""})'
            )
        first, ties, sizes = self.index.first, self.index.ties, self.index.sizes
        self.index.scores = scores
        for i, (one, two) in enumerate(scores) if relabel else ():
            better = (one < two) ^ self.invert_preference
            if (one < two or one > two) and better != first[i]:
                first[i] = better
                sizes[4 * i : 4 * i + 4] = sizes[4 * i + 2 : 4 * i + 4] + sizes[4 * i : 4 * i + 2]
            ties[i] = ties[i] and one == two

    def leave_out(self, kind: str, reasons: Mapping[int, str]) -> None:
        """Take pairs out of the table, by index with the reason for each, which goes to `problems`."""
        self.problems += [Problem(self.where(index), kind, reasons[index]) for index in sorted(reasons)]
        self._keep([index for index in range(len(self)) if index not in reasons])

    def part(self, places: Sequence[int]) -> PairTable:
        """A table of some of the pairs, in the order of `places`; the stored rows are shared."""
        found = copy.copy(self)
        found._keep(places)
        return found

    def _keep(self, places: Sequence[int]) -> None:
        """Leaves only these pairs in the table."""
        by_file, found = set(self.index.by_file), self.index.select(places)
        for place, index in enumerate(places):
            if index in by_file:
                refs = self.stored(index)
                found.files.add([str(ref.path) for ref in refs], [file_stat(ref) for ref in refs])
                found.by_file.append(place)
        if self._users is not None:
            self._users = self._users[0], array("q", (self._users[1][i] for i in places))
        self._take(found)

    def column(self, name: str) -> list[Any]:
        """A small column's value of each pair."""
        values = self.columns.column(name)
        return [values[row] for row in self.index.rows]

    def take_users(self, embeddings: Tensor, rows: Sequence[int]) -> None:
        """The users' embeddings float32 [user dim], and for each pair the row of its user."""
        self._users = embeddings, array("q", rows)

    def user(self, index: int) -> Tensor | None:
        """The embedding [dim] of a pair's user; None in a table without users."""
        return None if self._users is None else self._users[0][self._users[1][index]]

    @property
    def user_dim(self) -> int | None:
        """Length of the users' embeddings; None without users."""
        return None if self._users is None else int(self._users[0].shape[1])

    def stored(self, index: int) -> tuple[ImageRef, ...]:
        """Both images of a pair, in stored order. Raises ImageError when a side is empty in the stored row."""
        return stored_images(self.columns, self.layout, self.index.rows[index])

    def where(self, index: int) -> str:
        """The name of a pair's stored row in messages."""
        return self.columns.where(self.index.rows[index])

    @property
    def sizes(self) -> list[Size]:
        """(width, height) of every image, chosen and rejected in turn; empty with verify="none"."""
        return list(zip(self.index.sizes[::2], self.index.sizes[1::2]))

    def require_usable(self) -> None:
        """Raise DataError, with the first reason, when no pair is usable."""
        if not len(self):
            raise DataError(
                f"none of the {self.total_rows} rows is usable; `diffalign data check` shows the reasons "
                f"(first: {self.problems[0] if self.problems else 'no rows'})"
            )

    @property
    def ties(self) -> int:
        """Number of ties."""
        return sum(self.index.ties)

    def parts(self) -> dict[str, list[bytes | bytearray | array[Any]]]:
        """The pairs besides ids and prompts, as raw numbers by part, for hashing; see `table/identity`."""
        index = self.index
        parts: dict[str, list[bytes | bytearray | array[Any]]] = {"sides": [index.first, index.ties]}
        if index.scores is not None:
            parts["scores"] = [array("d", (value for pair in index.scores for value in pair))]
        if index.numbers:
            parts["terms"] = [values for _, values in sorted(index.numbers.items())]
        if self._users is not None:
            parts["users"] = [self._users[0].numpy().tobytes(), self._users[1]]
        if index.by_file:
            parts["sizes"] = [index.files.sizes]
        return parts

    @cached_property
    def identity(self) -> str:
        """Hash of what the pairs are, in their order: ids, prompts, which side is chosen, contents of image files.

        The same however the images were verified. Reads the image files that rows name, unless their hash is
        remembered; raises ImageError when one was removed.
        """
        digest, index = hashlib.blake2b(digest_size=16), self.index
        sides = map(self._identity, range(len(self)))
        for name, prompt, side in zip(self.ids, self.prompts, sides):
            digest.update("\x1f".join((name, prompt, side, "\x1e")).encode())
        if index.by_file:
            digest.update(index.files.contents(self.stored(place) for place in index.by_file).encode())
        return digest.hexdigest()
