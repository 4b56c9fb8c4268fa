"""HPDv2's json: several images of one prompt with a preference (train.json) or a ranking (test.json) of them.

`formats/rankings.py` makes pairs of its entries, or lists.
Image paths are relative to the json file or to the folder beside it that has its name (train.json and train/).
"""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path
from typing import Any

from diffalign.data.formats.columns import Columns, ListColumns
from diffalign.data.formats.rankings import (
    HIGHER,
    IMAGES,
    NEEDED,
    ORDERS,
    RankedColumns,
    has_pairs,
    is_number,
    ranks_of,
)
from diffalign.data.formats.text_files import odd, parse_json, read_text
from diffalign.data.row import DataError

ENTRY = f"prompt, image_path or images, and {NEEDED}"


def open_json(file: Path) -> Columns:
    """A json list: HPDv2 entries, or plain rows with the columns of any other format. Raises DataError."""
    try:
        entries = parse_json(read_text(file))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}); for one object per line use the ending .jsonl") from error
    if not isinstance(entries, list) or not any(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{file} must be a non-empty list of objects ({ENTRY})")
    several = [e for e in entries if isinstance(e, dict) and not has_pairs(e)]
    ranked = any(isinstance(entry.get(name), list) for entry in several for name in IMAGES)
    faults = {place: fault for place, entry in enumerate(entries) if (fault := _fault(entry, ranked))}
    rows = [{} if place in faults else entry for place, entry in enumerate(entries)]
    if ranked:
        rows = [_row(entry, file) if entry else {} for entry in rows]
    wheres = [f"{file.name} entry {number}" for number in range(len(entries))]
    stored = ListColumns(rows, wheres, storage=file.name, base=file.parent, faults=faults)
    return RankedColumns(stored, "images", stored.column("ranking"), faults) if ranked else stored


def _row(entry: dict[str, Any], file: Path) -> dict[str, Any]:
    """An entry with one name for its images and one for their order, in which lower is better."""
    name, order = _named(entry)
    rest = {key: value for key, value in entry.items() if key not in (*IMAGES, *ORDERS)}
    ranks = ranks_of(entry[order], higher=order in HIGHER)
    return {**rest, "images": [_beside(path, file) for path in entry[name]], "ranking": ranks}


def _named(entry: dict[str, Any]) -> tuple[str, str]:
    """The names of its images and of their order; a preference counts before a rank."""
    orders = ("human_preference", *(name for name in ORDERS if name != "human_preference"))
    return next((n for n in IMAGES if n in entry), ""), next((n for n in orders if n in entry), "")


def _contradict(entry: dict[str, Any], one: str, two: str) -> bool:
    """Whether an image is better than another in one order, and worse in the other."""
    found = [ranks_of(entry.get(name), higher=name in HIGHER) for name in (one, two)]
    if not all(isinstance(ranks, list) and all(map(is_number, ranks)) for ranks in found):
        return False
    first, second = zip(*zip(*found, strict=False), strict=True) if all(found) else ((), ())
    return any((first[i] - first[j]) * (second[i] - second[j]) < 0 for i, j in combinations(range(len(first)), 2))


def _fault(entry: Any, ranked: bool) -> str | None:
    if not isinstance(entry, dict):
        return f"a JSON {type(entry).__name__}; write an object"
    if not ranked:
        return None
    name, order = _named(entry)
    if other := next((n for n in IMAGES if n != name and entry.get(n, entry.get(name)) != entry.get(name)), None):
        return f"{name} and {other} have different images; keep one of them"
    if other := next((n for n in ORDERS if _contradict(entry, order, n)), None):
        return f"{order} {entry[order]!r:.60} and {other} {entry[other]!r:.60} contradict each other; keep one of them"
    if "prompt" not in entry or not isinstance(entry.get(order), list):
        return f"has the fields {sorted(entry)}; required: {ENTRY}"
    paths = entry.get(name, [])
    if not isinstance(paths, list):
        return f"its image paths are {paths!r:.60}; required: {ENTRY}"
    if len(paths) != len(entry[order]) or len(paths) < 2:
        return (
            f"{len(paths)} image paths for {len(entry[order])} preferences; each image needs one, and there "
            "must be at least two images"
        )
    return None


def _beside(path: Any, file: Path) -> Any:
    """A path as written, or below the folder that has the name of the json where only that is there."""
    if not isinstance(path, str) or odd(path):
        return path  # its row is dropped, with the reason
    in_folder = f"{file.stem}/{path}"
    there = [os.path.exists(file.parent / each) for each in (path, in_folder)]
    return in_folder if there == [False, True] else path
