"""Winners: prompts with one good image each, or the chosen side of pairs; for methods that make the other side."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

from diffalign.data.cells import image_ref, read_prompt
from diffalign.data.formats.columns import Columns
from diffalign.data.formats.pickapic import PROMPT
from diffalign.data.row import BAD_ROW, DUPLICATE, DataError, ImageError, ImageRef, Problem, check_size
from diffalign.data.spec import AS_FOUND, DataSpec, Verify
from diffalign.data.table.open import SeveralFormatsError, find_layout, open_columns, open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.prompts import Table
from diffalign.io.progress import Progress

# Accepted column names, best first.
PARTS = {
    "prompt": ("prompt", *(name for name in PROMPT if name != "prompt")),
    "image": ("image", "chosen", "winner", "image_path", "file_name", "jpg"),
}


class Winners(Table, Protocol):
    """A table whose rows have an image that is wanted."""

    def chosen(self, index: int) -> ImageRef:
        """The image, unopened. Raises ImageError where the stored row has none."""

    def where(self, index: int) -> str:
        """The row's name in messages."""


class WinnerTable:
    """The usable rows of a table with a prompt and one image; `problems` names every other row."""

    def __init__(self, columns: Columns, parts: Mapping[str, str], verify: Verify, limit: int | None) -> None:
        self.columns, self.image = columns, parts["image"]
        self.total_rows = len(columns)
        self.heldout: PairTable | None = None
        self.problems: list[Problem] = []
        self.ids: list[str] = []
        self.prompts: list[str] = []
        self._rows: list[int] = []
        prompts, seen = columns.column(parts["prompt"]), Counter[str]()
        for row in Progress(range(self.total_rows), desc="examining rows", unit=" rows", delay=3.0, mininterval=1.0):
            if limit is not None and len(self) >= limit:
                break
            if (fault := columns.fault(row)) is not None:
                self.problems.append(Problem(columns.where(row), BAD_ROW, fault))
                continue
            try:
                prompt = read_prompt(prompts[row], parts["prompt"])
                name = self._identify(row, prompt, verify)
            except ImageError as error:
                self.problems.append(Problem(columns.where(row), error.kind, str(error)))
                continue
            seen[name] += 1
            if seen[name] > 1:
                again = f"{name} was seen before; used as {name}#{seen[name]}"
                self.problems.append(Problem(columns.where(row), DUPLICATE, again, dropped=False))
                name = f"{name}#{seen[name]}"
            self._rows.append(row)
            self.ids.append(name)
            self.prompts.append(prompt)

    def __len__(self) -> int:
        return len(self.ids)

    def chosen(self, index: int) -> ImageRef:
        return self._ref(self._rows[index])

    def where(self, index: int) -> str:
        return self.columns.where(self._rows[index])

    @cached_property
    def identity(self) -> str:
        """Hash of ids and prompts in their order."""
        text = "\x1e".join(f"{name}\x1f{prompt}" for name, prompt in zip(self.ids, self.prompts, strict=True))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def require_usable(self) -> None:
        """Raise DataError, with the first reason, when no row is usable."""
        if not len(self):
            first = self.problems[0] if self.problems else "no rows"
            raise DataError(f"none of the {self.total_rows} rows is usable (first: {first})")

    def _ref(self, row: int) -> ImageRef:
        (cell,) = self.columns.cells(row, (self.image,))
        return image_ref(cell, self.columns.base(row), f"{self.columns.where(row)} {self.image}")

    def _identify(self, row: int, prompt: str, verify: Verify) -> str:
        """The id of a row: a hash of its prompt and of the image's path below the data folder, or of its bytes."""
        ref, base = self._ref(row), self.columns.base(row)
        by_path = base is not None and ref.path is not None and ref.span is None
        what = os.path.relpath(str(ref.path), base).encode() if by_path else ref.read()
        if verify != "none":
            check_size(ref.open().size if verify == "full" else ref.size(), ref.where)
        return hashlib.blake2b(prompt.encode() + b"\x1f" + what, digest_size=16).hexdigest()


def open_winners(path: str | Path, spec: DataSpec = AS_FOUND) -> Winners:
    """The winners of a file, folder or Hub data set: the chosen images of pairs, or rows of a prompt and an image.

    `spec.columns` may name the parts `prompt` and `image`. Raises DataError, also for `invert_preference` and
    `keep_ties`, which winners cannot have.
    """
    if spec.invert_preference or spec.keep_ties:
        raise DataError(f"{path}: winners have no other side: leave out invert_preference and keep_ties")
    named, stored = spec.columns, open_columns(path, spec.split)
    try:
        find_layout(stored, spec.format, named)
    except SeveralFormatsError:
        raise
    except DataError as error:
        parts = {part: column for part, column in named.items() if part in PARTS and column in stored.names}
        for part, names in PARTS.items():
            present = next((name for name in names if name in stored.names), None)
            if part not in parts and present is not None:
                parts[part] = present
        if spec.format != "auto" or parts.keys() != PARTS.keys() or named.keys() - PARTS.keys():
            raise DataError(
                f"{error}\nwinners alone need a prompt (one of {', '.join(PARTS['prompt'])}) and an image (one of "
                f"{', '.join(PARTS['image'])}), or columns={{'prompt': ..., 'image': ...}}"
            ) from error
        table = WinnerTable(stored, parts, spec.verify, spec.max_pairs)
        table.require_usable()
        return table
    pairs = open_pairs(stored, spec)
    pairs.require_usable()
    return pairs
