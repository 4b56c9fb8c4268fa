"""One cell of a stored row as a prompt or an image. A cell that is neither drops its row, with the reason."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.data.formats.text_files import odd
from diffalign.data.row import BAD_PROMPT, EMPTY_PROMPT, MISSING_SIDE, NOT_IMAGE, OUTSIDE, ImageError, ImageRef

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
_DRIVE = re.compile(r"[a-z]:[\\/]", re.IGNORECASE)


@dataclass(frozen=True)
class Absent:
    """A cell without a value, and where one was expected."""

    reason: str


def read_prompt(value: Any, column: str) -> str:
    """The prompt in a cell: a text, or chat messages of which the user's is the only one.

    Raises ImageError (empty prompt, bad prompt).
    """
    if isinstance(value, Absent):
        raise ImageError(EMPTY_PROMPT, value.reason)
    if isinstance(value, list | tuple):
        value = _message(value, column)
    if _empty(value) or (isinstance(value, str) and not value.strip()):
        raise ImageError(EMPTY_PROMPT, f"{column} is empty; write one or remove the row")
    if not isinstance(value, str):
        raise ImageError(BAD_PROMPT, f"{column} is {_short(value)}, a {type(value).__name__}; write a string")
    if fault := odd(value):
        raise ImageError(BAD_PROMPT, f"{column} {fault}: {_short(value)}; write a string in UTF-8")
    return value


def _message(messages: Sequence[Any], column: str) -> Any:
    """The text of chat messages ([{"role": "user", "content": …}], as TRL has them)."""
    if len(messages) == 1 and isinstance(messages[0], Mapping) and messages[0].get("role") == "user":
        content = messages[0].get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if len(parts) == 1 and isinstance(parts[0], Mapping) and isinstance(parts[0].get("text"), str):
            return parts[0]["text"]
    raise ImageError(
        BAD_PROMPT,
        f"{column} is a list, {_short(messages)}; write a string, or one user message whose content is a string",
    )


def image_ref(cell: Any, base: Path | None, where: str) -> ImageRef:
    """The reference behind an image cell. Raises ImageError: missing side, not an image, a path that leaves `base`."""
    if isinstance(cell, ImageRef):
        return cell
    if isinstance(cell, Absent):
        raise ImageError(MISSING_SIDE, f"{where}: {cell.reason}")
    data, path = (None, cell) if isinstance(cell, str) else (cell, None)
    if isinstance(cell, Mapping):
        if not {"bytes", "path"} & cell.keys():
            raise ImageError(NOT_IMAGE, f"{where} has the fields {sorted(map(str, cell))[:8]}; required: bytes or path")
        data, path = cell.get("bytes"), cell.get("path")
        if isinstance(data, str):
            data, path = None, data
    if isinstance(data, bytes | bytearray | memoryview) and len(data):
        return ImageRef(bytes(data), None, where)
    given = path if _empty(data) else data
    if isinstance(given, os.PathLike):  # rows that Python made
        given = os.fspath(given)
    if _empty(given):
        raise ImageError(MISSING_SIDE, f"{where} is empty; fill it or remove the row")
    if not isinstance(given, str):
        what = "a list" if isinstance(given, list | tuple) else f"a {type(given).__name__}"
        raise ImageError(
            NOT_IMAGE, f"{where} is {_short(given)}, {what}; each side is one image: its bytes, or the path of its file"
        )
    return ImageRef(None, _path(given, base, where), where)


def _path(path: str, base: Path | None, where: str) -> str:
    if fault := odd(path):
        raise ImageError(NOT_IMAGE, f"{where} {fault}: {_short(path)}; write the path of a file")
    if _ADDRESS.match(path):
        raise ImageError(
            NOT_IMAGE,
            f"{where} is the address {path[:80]!r}; images are not downloaded: save it as a file and write its path",
        )
    if os.sep == "/" and _DRIVE.match(path):
        raise ImageError(
            NOT_IMAGE, f"{where} is the Windows path {path!r}; write it relative to the folder of the data, with /"
        )
    if base is None:
        return path
    full = _inside(base, path, where)
    if os.sep == "/" and "\\" in path and not os.path.exists(full):
        slashed = _inside(base, path.replace("\\", "/"), where)
        if os.path.exists(slashed):
            return slashed
    return full


def _inside(base: Path, path: str, where: str) -> str:
    """`path` under `base`, judged by its letters: symlinks that the user made inside the folder are fine."""
    root = os.path.abspath(base)
    full = os.path.normpath(os.path.join(root, path))
    if os.path.commonpath([root, full]) != root:
        raise ImageError(
            OUTSIDE,
            f"{where} is {path!r}, which leaves {base}; paths are relative to that folder and stay in it "
            "(move the file there, or link the image folder into it)",
        )
    return full


def _empty(value: Any) -> bool:
    """None, an empty text or bytes, and NaN, which pandas writes for none."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        return not len(value)
    return value is None or (isinstance(value, float) and value != value)


def _short(value: Any) -> str:
    return reprlib.repr(value)
