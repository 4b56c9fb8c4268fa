"""Prompts from a file or from the command line, and as the table of a run that makes its own pictures."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from diffalign.data.rows import DataError, Problem

COLUMNS = ("prompt", "caption")
LONGEST_NAME = 255  # bytes that file systems allow; a longer text can only be a prompt
FORMATS = (".txt", ".jsonl", ".csv", ".parquet")


class PromptError(DataError):
    """Prompts cannot be read; the message names file and row."""


class Table(Protocol):
    """What every table of a run has, of pairs, of winners or of prompts alone: rows with an id and a prompt."""

    ids: list[str]
    prompts: list[str]
    problems: list[Problem]
    total_rows: int

    def __len__(self) -> int: ...

    @property
    def identity(self) -> str:
        """Hash of what the rows are, in their order."""


class PromptTable:
    """Prompts, each once; a prompt's id is a hash of its text, so that it draws the same in every file."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts = list(prompts)
        self.ids = [hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest() for prompt in self.prompts]
        self.problems: list[Problem] = []
        self.total_rows = len(self.prompts)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def identity(self) -> str:
        """Hash of the prompts in their order."""
        return hashlib.blake2b("\x1f".join(self.ids).encode(), digest_size=16).hexdigest()


def open_prompts(path: str, *, limit: int | None = None) -> PromptTable:
    """The prompts of a file as a table. Raises PromptError, also for a path that is no such file."""
    if Path(path).suffix.lower() not in FORMATS:
        raise PromptError(f"{path}: prompts are read from a file that ends in {', '.join(FORMATS)}")
    return PromptTable(read_prompts(path, limit=limit))


def read_prompts(source: str, *, limit: int | None = None) -> list[str]:
    """The prompts in a .txt (one per line), .jsonl, .csv or .parquet file, or `source` itself as one prompt.

    Tables need a column `prompt` or `caption`. Blank lines of a .txt file separate nothing and are skipped; an
    empty cell of a table is an error that names the row (1 = the first). Repeated prompts are kept once, in
    order of first appearance: a picture depends on (prompt, seed) only, so a repeat would only feign data.
    """
    path = Path(source)
    if path.suffix.lower() not in FORMATS:
        if len(source) < LONGEST_NAME and path.is_file():
            raise PromptError(f"{source}: cannot read prompts from '{path.suffix}'; allowed: {', '.join(FORMATS)}")
        prompts = [source]
    elif not path.is_file():
        raise PromptError(f"{source}: no such file")
    elif path.suffix.lower() == ".txt":
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        prompts = _column(_rows(path), source)
    if not any(prompt.strip() for prompt in prompts):
        raise PromptError(f"{source!r}: no prompt in it")
    return unique(prompts)[:limit]


def unique(prompts: Iterable[str]) -> list[str]:
    """The prompts without repeats, in order."""
    return list(dict.fromkeys(prompts))


def _rows(path: Path) -> list[dict]:
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as parquet

        names = [name for name in parquet.read_schema(path).names if name in COLUMNS]
        return parquet.read_table(path, columns=names).to_pylist()
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise PromptError(f"{path}, line {number}: not JSON ({error})") from error
        if row is not None:
            rows.append(row if isinstance(row, dict) else {"prompt": row})
    return rows


def _column(rows: list[dict], source: str) -> list[str]:
    names = list(rows[0]) if rows else []
    column = next((name for name in COLUMNS if name in names), None)
    if column is None:
        raise PromptError(f"{source}: no column {' or '.join(COLUMNS)}; its columns are {names}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise PromptError(f"{source}, row {number}: {column} is {row.get(column)!r}; give it a text or delete it")
    return [row[column].strip() for row in rows]
