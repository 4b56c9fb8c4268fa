"""Text listings: jsonl, csv and tsv with a prompt and image paths relative to the listing."""

from __future__ import annotations

from pathlib import Path

from diffalign.data.formats.columns import ListColumns
from diffalign.data.formats.text_files import read_csv, read_json_lines
from diffalign.data.row import DataError

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")


def open_listing(file: Path, plain: str | None = None) -> ListColumns:
    """One row per line; a line that does not parse becomes a faulty row. Raises DataError.

    plain: the column of bare values in a jsonl, see `read_json_lines`.
    """
    lines = read_csv(file)[1] if file.suffix.lower() in (".csv", ".tsv") else read_json_lines(file, plain)
    if not lines:
        raise DataError(f"{file} has no rows; write one line per pair (prompt, chosen, rejected) or per prompt")
    return ListColumns(
        [line.row for line in lines],
        [f"{file.name} line {line.number}" for line in lines],
        storage=file.name,
        base=file.parent,
        faults={place: line.fault for place, line in enumerate(lines) if line.fault is not None},
    )
