"""`manifest.jsonl` of a folder of images: one line an image, written by `generate` or by hand.

Each line is checked before anything is computed; an error names file, line and field.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.errors import DiffalignError, MissingFileError
from diffalign.io.files import save_text

MANIFEST = "manifest.jsonl"
FIELDS = '{"file": "a.png", "prompt": "...", "seed": 0}'


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image on disk."""

    prompt: str
    seed: int
    file: Path

    def open(self) -> Image.Image:
        """The image as RGB. Raises DiffalignError for a file that is not a complete image."""
        try:
            with Image.open(self.file) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, FileNotFoundError):
                raise MissingFileError(f"{self.file} does not exist any more; restore it") from None
            raise DiffalignError(
                f"{self.file}: the image cannot be read ({error}); generate it again, or delete it and its line in "
                f"{MANIFEST}"
            ) from None


def read_image_manifest(folder: str | Path, *, complete: bool = False) -> list[GeneratedImage]:
    """The finished images of a folder, in the order they were made. Raises MissingFileError without a manifest.

    complete: raise as well where the manifest names no image, or one that does not exist.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise MissingFileError(
            f"{folder / MANIFEST} does not exist; `diffalign generate` writes it, or write one line per image: {FIELDS}"
        )
    found = {(row["prompt"], row["seed"]): folder / row["file"] for row in manifest_rows(folder)}
    there = [GeneratedImage(prompt, seed, file) for (prompt, seed), file in found.items() if file.is_file()]
    if complete and len(there) < max(1, len(found)):
        gone = next((file for file in found.values() if not file.is_file()), None)
        raise MissingFileError(
            f"{folder / MANIFEST} names {len(found)} images, and {len(found) - len(there)} of them do not exist"
            + (f" (first: {gone.name}); restore them or delete their lines" if gone else "; generate some first")
        )
    return there


def manifest_rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of a manifest, checked. Raises DiffalignError naming file, line and field.

    A last line without an end that is not a complete row was being written when the run was stopped: it is left out.
    """
    file, rows = folder / MANIFEST, []
    places: dict[tuple[str, int], tuple[int, str]] = {}  # line and file by prompt and seed
    lines, torn = _lines(file)
    for number, line in enumerate(lines, start=1):
        last = torn and number == len(lines)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if last:
                break
            raise DiffalignError(f"{file}, line {number}: not JSON ({error}); write {FIELDS}") from None
        _check(row, f"{file}, line {number}")
        key = row["prompt"], row["seed"]
        if key in places and places[key][1] != row["file"]:
            raise DiffalignError(
                f"{file}, line {number}: prompt {key[0]!r} with seed {key[1]} is {places[key][1]!r} on line "
                f"{places[key][0]} and {row['file']!r} here; keep one of them, or give them seeds of their own"
            )
        places[key] = number, row["file"]
        rows.append(row)
    return rows


def mend_end(folder: Path) -> None:
    """Takes a torn last line off a manifest, so that more can be written behind it."""
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in manifest_rows(folder)]
    save_text(folder / MANIFEST, "".join(rows))


def _lines(file: Path) -> tuple[list[str], bool]:
    """The lines of a file, and whether the last one has no end."""
    raw = file.read_bytes()
    torn = bool(raw) and not raw.endswith(b"\n")
    end = raw.rfind(b"\n") + 1
    try:
        head = raw[:end].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DiffalignError(f"{file}, line {line}: not UTF-8; save the file as UTF-8") from None
    tail = [raw[end:].decode("utf-8-sig", errors="replace")] if torn else []
    return head.split("\n")[:-1] + tail, torn


def _check(row: Any, where: str) -> None:
    """Raises DiffalignError unless a line has a file, a prompt and a seed."""
    if not isinstance(row, dict):
        raise DiffalignError(f"{where}: {row!r:.80} is not an image; write {FIELDS}")
    for field, kind, words in (("file", str, "a file name"), ("prompt", str, "a text"), ("seed", int, "a number")):
        value: Any = row.get(field)
        good = isinstance(value, kind) and not isinstance(value, bool)
        if good and kind is str:
            good = "\0" not in value and not any(0xD800 <= ord(c) < 0xE000 for c in value)
        if good and field == "file":
            good = bool(value.strip()) and len(value.encode()) < 4096
        if good and field == "seed":
            good = 0 <= value < 2**63
        if not good:
            has = f"{field} is {value!r:.80}" if field in row else f"{field} is missing"
            range_ = " from 0 to 2^63 - 1" if field == "seed" else ""
            raise DiffalignError(f"{where}: {has}; it must be {words}{range_}, as in {FIELDS}")
    if not isinstance(row.get("settings", {}), dict):
        raise DiffalignError(
            f"{where}: settings is {row['settings']!r:.80}; leave it out, or generate the folder again"
        )
