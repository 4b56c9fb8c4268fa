"""Prompts from a file, a named set or the command line, and as the table of a run that makes its own images."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from diffalign.data.cells import read_prompt
from diffalign.data.formats.columns import Columns
from diffalign.data.formats.parquet import ParquetColumns
from diffalign.data.formats.text_files import lines_of, odd, open_listing, read_text
from diffalign.data.prompt_sets.fetch import set_prompts
from diffalign.data.prompt_sets.known import named
from diffalign.data.row import DataError, ImageError, Problem
from diffalign.io.paths import expanded

if TYPE_CHECKING:
    from diffalign.data.table.pairs import PairTable

COLUMNS = ("prompt", "caption")
LONGEST_NAME = 255  # bytes that file systems allow; a longer text can only be a prompt
FORMATS = (".txt", ".jsonl", ".csv", ".parquet")
OTHER_FILES = (".json", ".tsv", ".yaml", ".yml", ".md", ".text", ".list", ".arrow", ".zip", ".gz", ".png", ".jpg")


class PromptError(DataError):
    """Prompts cannot be read; the message names file and row."""


class Table(Protocol):
    """A table of a run, of pairs, of winners or of prompts alone: rows with an id and a prompt."""

    @property
    def ids(self) -> Sequence[str]:
        """The id of each row."""

    @property
    def prompts(self) -> Sequence[str]:
        """The prompt of each row."""

    problems: list[Problem]
    total_rows: int
    heldout: PairTable | None  # pairs that a run on this table measures and does not train on

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
        self.heldout: PairTable | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def identity(self) -> str:
        """Hash of the prompts in their order."""
        return hashlib.blake2b("\x1f".join(self.ids).encode(), digest_size=16).hexdigest()


def open_prompts(path: str, *, limit: int | None = None) -> PromptTable:
    """The prompts of a file or of a named set as a table. Raises PromptError, also for a path that is no such file."""
    if named(path) is None and Path(path).suffix.lower() not in FORMATS:
        raise PromptError(
            f"{path}: prompts are read from a file that ends in {', '.join(FORMATS)}, or from a set of "
            "`diffalign list prompts`"
        )
    return PromptTable(read_prompts(path, limit=limit))


def read_prompts(source: str, *, limit: int | None = None) -> list[str]:
    """The prompts in a .txt (one per line), .jsonl, .csv or .parquet file, of a named set, or `source` as one prompt.

    A set is named as in `diffalign list prompts`, a part of one as `hpdv2:photo`; it is fetched once where needed.
    Tables need a column `prompt` or `caption`. Blank lines of a .txt file separate nothing and are skipped; an
    empty cell of a table is an error that names the row or line. Repeated prompts are used once, in
    order of first appearance: an image depends on (prompt, seed) only, so a repeat adds no data.
    Raises PromptError where no prompt is left, and for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise PromptError(f"limit={limit}: must be at least 1; leave it out to use all prompts")
    if (found := named(source)) is not None:
        return set_prompts(*found)[:limit]
    if not _may_be_path(source):
        return unique([_text(source)])[:limit]
    path = Path(expanded(source))
    if path.is_dir():
        raise PromptError(f"{source} is a folder; name a file in it that ends in {', '.join(FORMATS)}")
    if not path.is_file():
        raise PromptError(
            f"{source}: no such file{_nearest(path)} If it is a prompt, write it into a .txt file and name that"
        )
    if path.suffix.lower() not in FORMATS:
        raise PromptError(f"{source}: cannot read prompts from '{path.suffix}'; allowed: {', '.join(FORMATS)}")
    if path.suffix.lower() == ".txt":
        prompts = _lines(path)
    else:
        prompts = _column(path)
    if not any(prompt.strip() for prompt in prompts):
        raise PromptError(f"{source!r}: contains no prompt")
    return unique(prompts)[:limit]


def prompts_of(given: str | Sequence[str]) -> Sequence[str]:
    """Prompts as a list; one text is a file, a set's name or a prompt, as `read_prompts` takes it."""
    return read_prompts(given) if isinstance(given, str) else given


def _may_be_path(source: str) -> bool:
    """Whether a text is meant as a file or folder: one is there, or it ends or begins as the name of one does."""
    if "\n" in source or len(source.encode(errors="replace")) >= LONGEST_NAME or "\0" in source:
        return False
    suffix = Path(source).suffix.lower()
    if suffix in (*FORMATS, *OTHER_FILES) or os.path.lexists(source):
        return True
    if any(c.isspace() for c in source.strip()):
        return False
    separated = "/" in source or "\\" in source
    return source.startswith(("~", "/", "./", "../")) or (
        separated and re.fullmatch(r"\.[a-z]\w{0,7}", suffix) is not None
    )


def _text(prompt: str) -> str:
    """A prompt that was given itself. Raises PromptError for characters that are no text."""
    if fault := odd(prompt):
        raise PromptError(f"the prompt {prompt!r} {fault}; write a string in UTF-8")
    if not prompt.strip():
        raise PromptError(f"{prompt!r}: contains no prompt; give a string, or a file that ends in {', '.join(FORMATS)}")
    return prompt


def _nearest(path: Path) -> str:
    """The end of a message about a file that is not there."""
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})."
    files = [file.name for file in path.parent.iterdir() if file.suffix.lower() in FORMATS]
    close = difflib.get_close_matches(path.name, files, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / close[0]}?" if close else "."


def unique(prompts: Iterable[str]) -> list[str]:
    """The prompts without repeats, in order."""
    return list(dict.fromkeys(prompts))


def _lines(path: Path) -> list[str]:
    found = []
    for number, line in enumerate(lines_of(read_text(path)), start=1):
        if fault := odd(line):
            raise PromptError(f"{path}, line {number}: it {fault}; write a string in UTF-8")
        if line.strip():
            found.append(line.strip())
    return found


def _column(path: Path) -> list[str]:
    """The prompts of a table. Raises PromptError naming the row that has none."""
    if path.suffix.lower() == ".parquet":
        stored: Columns = ParquetColumns([path])
    else:
        stored = open_listing(path, plain="prompt")
    column = next((name for name in COLUMNS if name in stored.names), None)
    faults = {row: fault for row in range(len(stored)) if (fault := stored.fault(row)) is not None}
    if faults:
        row, fault = next(iter(faults.items()))
        raise PromptError(f"{path.parent / stored.where(row)}: {fault}")
    if column is None:
        raise PromptError(f"{path}: no column {' or '.join(COLUMNS)}; its columns are {list(stored.names)}")
    prompts = []
    for row, cell in enumerate(stored.column(column)):
        try:
            prompts.append(read_prompt(cell, column).strip())
        except ImageError as error:
            raise PromptError(f"{path.parent / stored.where(row)}: {error}") from error
    return prompts
