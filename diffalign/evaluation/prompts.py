"""Prompts from a file or from the command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

COLUMNS = ("prompt", "caption")
LONGEST_NAME = 255  # bytes that file systems allow; a longer text can only be a prompt
FORMATS = (".txt", ".jsonl", ".csv", ".parquet")


class PromptError(ValueError):
    """Prompts cannot be read; the message names file and row."""


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
