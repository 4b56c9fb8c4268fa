"""A folder of pairs: chosen/NAME.png and rejected/NAME.png, prompts in NAME.txt or in one captions file.

Prompts are looked for in this order: captions.json ({"NAME": "prompt"}), captions.jsonl, captions.csv (both with
`name` and `prompt`, and where wanted weight, margin and mask), then NAME.txt beside the folders, in chosen/ or in
prompts/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffalign.data.columns import ListColumns
from diffalign.data.listing import open_listing
from diffalign.data.rows import DataError
from diffalign.data.terms import TERMS

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
CAPTIONS = ("captions.json", "captions.jsonl", "captions.csv")
SIDES = ("chosen", "rejected")


def is_pair_folder(folder: Path) -> bool:
    """Whether the folder has both sides as folders."""
    return all((folder / side).is_dir() for side in SIDES)


def open_folder(folder: Path) -> ListColumns:
    """One row per NAME found on either side, in name order; a name on one side only lacks the other."""
    sides = {side: _images(folder / side, side) for side in SIDES}
    captions = _captions(folder)
    rows, wheres = [], []
    for name in sorted({name for images in sides.values() for name in images}):
        said = captions.get(name, {}) if captions is not None else {"prompt": _text(folder, name)}
        rows.append({"prompt": None, **said, **{side: sides[side].get(name) for side in SIDES}})
        wheres.append(f"pair {name}")
    if not rows:
        raise DataError(f"{folder}/chosen and {folder}/rejected hold no images; known endings: {IMAGES}")
    return ListColumns(rows, wheres, storage=f"folder {folder.name}", base=folder)


def _images(folder: Path, side: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in IMAGES:
            continue
        if file.stem in found:
            raise DataError(f"{folder} has both {found[file.stem]} and {file.name}; keep one image per name")
        found[file.stem] = f"{side}/{file.name}"
    return found


def _captions(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What the captions file says of each name: its prompt, and its weight, margin and mask where there are columns."""
    for name in CAPTIONS:
        file = folder / name
        if not file.is_file():
            continue
        if file.suffix == ".json":
            found = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise DataError(f"{file} must be one object that maps names to prompts")
            found = {key: {"prompt": prompt} for key, prompt in found.items()}
        else:
            listing = open_listing(file)
            if not {"name", "prompt"} <= set(listing.names):
                raise DataError(f"{file} has {sorted(listing.names)}; it needs the columns name and prompt")
            parts = [part for part in ("prompt", *TERMS) if part in listing.names]
            values = zip(*(listing.column(part) for part in parts), strict=True)
            found = {key: dict(zip(parts, row, strict=True)) for key, row in zip(listing.column("name"), values)}
        return {Path(str(key)).stem if Path(str(key)).suffix.lower() in IMAGES else str(key): said
                for key, said in found.items()}  # fmt: skip
    return None


def _text(folder: Path, name: str) -> str | None:
    for parent in (folder, folder / "chosen", folder / "prompts"):
        file = parent / f"{name}.txt"
        if file.is_file():
            return file.read_text(encoding="utf-8-sig").strip()
    return None
