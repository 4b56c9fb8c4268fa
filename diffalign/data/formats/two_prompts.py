"""Rows with two prompts and an image of each: every image is the chosen one for its own prompt.

InstructEngine (arXiv 2504.10329) makes pairs of instructions that differ in one detail and compares across them: a row
(c0, y0, c1, y1) is two pairs, y0 over y1 for c0 and y1 over y0 for c1. Here they become two ordinary rows of preference
columns, whatever the storage, and everything behind the readers sees nothing else.

Left out: the paper's third image per row (its cross-validated triples), and how its prompts are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.formats.columns import Columns
from diffalign.data.formats.pickapic import Layout
from diffalign.data.weights import TERMS

PARTS: dict[str, tuple[str, ...]] = {
    "prompt_0": ("prompt_0", "caption_0"),
    "prompt_1": ("prompt_1", "caption_1"),
    "image_0": ("jpg_0", "image_0", "image_path_0"),
    "image_1": ("jpg_1", "image_1", "image_path_1"),
    "uid_0": ("image_0_uid", "uid_0"),
    "uid_1": ("image_1_uid", "uid_1"),
}
OPTIONAL = frozenset({"uid_0", "uid_1"})
FORMAT = "two_prompts"

_SIDES = ("chosen", "rejected")
_UIDS = ("chosen_uid", "rejected_uid")


class TwoPrompts:
    """The stored rows as twice as many: row 2i prefers image_0 for prompt_0, row 2i + 1 image_1 for prompt_1."""

    def __init__(self, stored: Columns, found: Mapping[str, str]) -> None:
        self.stored, self.in_memory, self.files = stored, stored.in_memory, stored.files
        self.storage = f"{stored.storage}, two pairs per row"
        self._images = (found["image_0"], found["image_1"])
        self._prompts = tuple(stored.column(found[part]) for part in ("prompt_0", "prompt_1"))
        uids = [found[part] for part in ("uid_0", "uid_1") if part in found]
        self._uids = tuple(stored.column(name) for name in uids) if len(uids) == 2 else ()
        self._terms = {part: found[part] for part in TERMS if part in found}  # of both pairs
        self.names = ("prompt", *_SIDES, *_UIDS, *TERMS)

    def __len__(self) -> int:
        return 2 * len(self.stored)

    @property
    def layout(self) -> Layout:
        """Preference columns."""
        return Layout(FORMAT, "prompt", _SIDES, uids=_UIDS if self._uids else ())

    def column(self, name: str) -> Sequence[Any]:
        if name == "prompt":
            return [text for both in zip(*self._prompts, strict=True) for text in both]
        if name in self._terms:
            return [value for value in self.stored.column(self._terms[name]) for _ in range(2)]
        other = _UIDS.index(name)
        return [uids[side ^ other] for uids in zip(*self._uids, strict=True) for side in range(2)]

    def cells(self, row: int, names: Sequence[str]) -> list[Any]:
        stored = {part: column for part, column in self._terms.items() if part in names}
        stored |= {name: self._images[row % 2 ^ side] for side, name in enumerate(_SIDES) if name in names}
        return self.stored.cells(row // 2, [stored[name] for name in names])

    def where(self, row: int) -> str:
        return f"{self.stored.where(row // 2)} (prompt_{row % 2})"

    def fault(self, row: int) -> str | None:
        one, two = (texts[row // 2] for texts in self._prompts)
        if isinstance(one, str) and one == two:
            return "prompt_0 and prompt_1 are the same, so each image would be preferred over the other"
        return self.stored.fault(row // 2)

    def base(self, row: int) -> Path | None:
        return self.stored.base(row // 2)
