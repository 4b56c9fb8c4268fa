"""Paths as users write them in configs and on command lines."""

from __future__ import annotations

from pathlib import Path

from diffalign.errors import DiffalignError

LONGEST = 4095  # bytes of a path; Linux


def expanded(path: str) -> str:
    """`path` with a leading `~` as the home folder. Raises DiffalignError for text that no file system accepts."""
    if not path.strip():
        raise DiffalignError("the path is empty; name a file or folder, or leave it out")
    odd = next((c for c in path if ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000), None)
    if odd is not None:
        raise DiffalignError(f"{path!r}: a path cannot have the character {odd!r}; rename the file or folder")
    if len(path.encode()) > LONGEST:
        raise DiffalignError(f"{path[:60]!r}…: the path has more than {LONGEST} bytes; use a shorter one")
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise DiffalignError(
            f"{path!r}: no home folder is known for it; write the folder in full, or ./{path} for this very name"
        ) from None
