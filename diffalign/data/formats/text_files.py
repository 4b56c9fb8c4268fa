"""Text files that users bring: UTF-8 with or without a byte order mark, as one text, as lines, or as rows.

A line ends at a line feed, a carriage return or both, as in any editor; other separators (U+2028, form feeds) are part
of the text. Of CSV the delimiter (comma, semicolon or tab) follows from the header.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.data.formats.columns import ListColumns
from diffalign.data.row import DataError, stand_in

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")  # of listings
LONGEST = 1 << 24  # characters of a CSV value: masks are grids of numbers
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """A row of a text file: the line it begins on (1 = the first), its values, and why it cannot be used, or None."""

    number: int
    row: dict[str, Any]
    fault: str | None = None


def read_text(file: Path) -> str:
    """The text of a file. Raises DataError naming the line that is not UTF-8."""
    raw = _bytes(file)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{raw[error.start]:02x}"
        raise DataError(f"{file} line {line}: not UTF-8 ({byte}); save the file as UTF-8") from error


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their ends."""
    return re.split(r"\r\n|\n|\r", text)


def odd(text: str) -> str | None:
    """The fault of a text that no prompt and no path can have, or None."""
    if "\0" in text:
        return "contains a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return f"is not UTF-8 (byte 0x{code - 0xDC00:02x})" if 0xDC80 <= code <= 0xDCFF else (
            f"contains half a character (U+{code:04X}, a surrogate without its other half)"
        )  # fmt: skip
    return None


def parse_json(text: str | bytes) -> Any:
    """JSON, or ValueError: also for a key that is there twice, numbers too long and nesting too deep."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in (other for other, _ in pairs[:place]))
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


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


def read_json_lines(file: Path, plain: str | None = None) -> list[Line]:
    """The objects of a file with one a line, blank lines left out.

    plain: the column that a bare text or number goes to; None: it is a fault.
    """
    found = []
    for number, line in enumerate(lines_of(_leniently(file)), start=1):
        if not line.strip():
            continue
        row: Any = {}
        fault = odd(line)
        if fault is None:
            try:
                row = parse_json(line)
            except ValueError as error:
                fault = f"not JSON ({error}); write one object per line"
        else:
            fault = f"the line {fault}; save the file as UTF-8"
        if not isinstance(row, dict):
            fault = None if plain else f"a JSON {type(row).__name__}; write one object per line"
            row = {plain: row} if plain else {}
        found.append(Line(number, row, fault))
    return found


def read_csv(file: Path) -> tuple[list[str], list[Line]]:
    """The column names and rows of a CSV file.

    A row with more or fewer fields than the header has, or with quotes that do not fit, is faulty. Raises DataError
    for a header that cannot be read and for a quote that is still open where the file ends.
    """
    text = _leniently(file)
    delimiter = _delimiter(text, file)
    limit = csv.field_size_limit(LONGEST)
    try:
        return _csv_rows(text, delimiter, file)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(text: str, delimiter: str, file: Path) -> tuple[list[str], list[Line]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    found: list[Line] = []
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return names, found
        except csv.Error as error:
            if "unexpected end" in str(error) or not names:
                raise DataError(
                    f"{file} line {number}: a quote is opened and not closed before the file ends ({error}); "
                    'close it, or write "" for a quote inside a quoted value'
                ) from error
            lines = f" (lines {number} to {reader.line_num})" if reader.line_num > number else ""
            found.append(Line(number, {}, f'{error}{lines}; quote the whole value and write "" for a quote inside it'))
            continue
        if not fields:
            continue
        if not names:
            names = [field.strip() for field in fields]
            if len(set(names)) < len(names) or odd(text_of := "".join(names)):
                why = odd(text_of) if len(set(names)) == len(names) else "names a column twice"
                raise DataError(f"{file} line {number}: the header {names} {why}; give each column its own name")
            continue
        fault = None
        if len(fields) != len(names):
            fault = (
                f"{len(fields)} fields where the header has {len(names)}; put values that hold a "
                f"{DELIMITERS[delimiter]} in double quotes"
            )
        found.append(Line(number, dict(zip(names, fields)), fault))


def _delimiter(text: str, file: Path) -> str:
    """The one that splits the header. Raises DataError where several do."""
    header = next((line for line in lines_of(text) if line.strip()), "")
    several = []
    for each in DELIMITERS:
        try:
            if len(next(csv.reader([header], delimiter=each), [])) > 1:
                several.append(each)
        except csv.Error:
            continue
    if "\t" in several and file.suffix.lower() == ".tsv":
        return "\t"
    if len(several) > 1:
        named = " and ".join(DELIMITERS[each] for each in several)
        raise DataError(
            f"{file}: several delimiters split its header {header!r} ({named}); put names that contain a "
            "delimiter in double quotes"
        )
    return several[0] if several else ","


def _bytes(file: Path) -> bytes:
    raw = file.read_bytes()
    if raw.startswith(_UTF16):
        raise DataError(f"{file} is UTF-16; save it as UTF-8")
    if (instead := stand_in(raw[:64])) is not None:
        raise DataError(f"{file}: {instead}")
    return raw.removeprefix(_BOM)


def _leniently(file: Path) -> str:
    """The text of a file; bytes that are not UTF-8 become lone surrogates, so that `odd` finds them in their row."""
    return _bytes(file).decode("utf-8", "surrogateescape")
