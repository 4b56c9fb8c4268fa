"""One interface to every storage of rows: small columns are read at once, image cells one row at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Columns(Protocol):
    """A stored table of pairs. Image cells are never decoded here."""

    storage: str  # for people: "3 parquet files", "pairs.jsonl"
    names: tuple[str, ...]
    in_memory: bool  # image cells are paths or references that are here already; False: looking at one reads storage
    files: Sequence[Path]  # what the rows are stored in; empty where that is not known

    def __len__(self) -> int: ...

    def column(self, name: str) -> Sequence[Any]:
        """All values of a column that is small enough to read at once (labels, prompts, uids)."""

    def cells(self, row: int, names: Sequence[str]) -> list[Any]:
        """The image cells of one row: bytes, a path, a {"bytes", "path"} dict, an ImageRef or None."""

    def where(self, row: int) -> str:
        """The row's name in messages."""

    def fault(self, row: int) -> str | None:
        """Why the row could not even be parsed, or None."""

    def base(self, row: int) -> Path | None:
        """The folder that image paths of this row are relative to and must stay in; None: paths are trusted."""


class ListColumns:
    """Rows as dictionaries in memory: of a text listing, a folder or a tar index."""

    in_memory = True

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        wheres: Sequence[str],
        *,
        storage: str,
        base: Path | None,
        faults: Mapping[int, str] | None = None,
        files: Sequence[Path] = (),
    ) -> None:
        self.rows, self.wheres, self.storage, self._base = rows, wheres, storage, base
        self.files = files
        self.faults = dict(faults or {})
        self.names = tuple(dict.fromkeys(name for row in rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self.rows]

    def cells(self, row: int, names: Sequence[str]) -> list[Any]:
        return [self.rows[row].get(name) for name in names]

    def where(self, row: int) -> str:
        return self.wheres[row]

    def fault(self, row: int) -> str | None:
        return self.faults.get(row)

    def base(self, row: int) -> Path | None:
        return self._base
