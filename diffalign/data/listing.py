"""Text listings: jsonl, csv and tsv with a prompt and image paths relative to the listing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from diffalign.data.columns import ListColumns
from diffalign.data.rows import DataError

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")


def open_listing(file: Path) -> ListColumns:
    """One row per line; a line that does not parse becomes a faulty row."""
    rows: list[dict[str, Any]] = []
    wheres: list[str] = []
    faults: dict[int, str] = {}
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            if file.suffix in (".csv", ".tsv"):
                reader = csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ",")
                for row in reader:
                    if row.pop(None, None) is not None:
                        faults[len(rows)] = "more fields than the header has; quote values that hold the delimiter"
                    rows.append(row)
                    wheres.append(f"{file.name} line {reader.line_num}")
            else:
                for number, line in enumerate(stream, start=1):
                    if not line.strip():
                        continue
                    row, fault = _parsed(line)
                    if fault:
                        faults[len(rows)] = fault
                    rows.append(row)
                    wheres.append(f"{file.name} line {number}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is not a readable text listing ({error}); save it as UTF-8") from error
    if not rows:
        raise DataError(f"{file} has no rows; write one line per pair with prompt, chosen and rejected")
    return ListColumns(rows, wheres, storage=file.name, base=file.parent, faults=faults)


def _parsed(line: str) -> tuple[dict[str, Any], str | None]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return {}, f"not JSON ({error}); write one object per line"
    if not isinstance(row, dict):
        return {}, f"a JSON {type(row).__name__}; write one object per line"
    return row, None
