"""The list of a checkpoint's files, or of a run's final weights, with sizes and hashes; it is written last.

    manifest.json    {"sha256": of the rest as sorted JSON, "content": {"format", "step", "files", ...}}

Files without a manifest are of an early version, or of a run that was killed before it wrote the manifest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError
from diffalign.io.files import file_faults, sync

MANIFEST = "manifest.json"
FORMAT = 1


def write_manifest(folder: Path, content: dict[str, Any], name: str = MANIFEST) -> None:
    """Writes the manifest `name` of a folder, with this version's format, and flushes it to the disk."""
    content = {"format": FORMAT, **content}
    (folder / name).write_text(json.dumps({"sha256": _hash(content), "content": content}, indent=2) + "\n")
    sync(folder / name)


def read_manifest(folder: Path) -> dict[str, Any] | str:
    """A manifest's content, or its fault. Raises DiffalignError for the format of a later version."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
        content, stated = dict(found["content"]), found["sha256"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is not readable"
    if stated != _hash(content):
        return f"{MANIFEST} has another content than was written (its SHA-256 differs)"
    if content["format"] > FORMAT:
        raise DiffalignError(
            f"{folder / MANIFEST} has format {content['format']}, and this version of diffalign reads up to {FORMAT}: "
            "use the version that wrote it"
        )
    return content


def fault(folder: Path, *, hashes: bool = True) -> str | None:
    """The fault of a folder's manifest or of the files that it lists; None where all is as it was written."""
    content = read_manifest(folder)
    if isinstance(content, str):
        return content
    return "; ".join(file_faults(folder, content["files"], hashes=hashes)) or None


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
