"""HPDv2's json: several images of one prompt with a preference (train.json) or a ranking (test.json) of them.

Every two images of an entry become a row, with the entry's weight, margin and mask where it has them, or those of its
pairs that `RankedColumns.only` chooses.
Image paths are relative to the json file or to the folder beside it that has its name (train.json and train/).
"""

from __future__ import annotations

import math
import os
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from diffalign.data.formats.columns import ListColumns
from diffalign.data.formats.text_files import odd, parse_json, read_text
from diffalign.data.row import DataError
from diffalign.data.weights import TERMS

IMAGES = ("image_path", "file_path")
PAIRS_OF_RANKING = ("all", "best_worst", "adjacent")
NEEDED = "prompt, image_path, and human_preference (1 = preferred) or rank (1 = best)"


def open_json(file: Path) -> ListColumns:
    """A json list: HPDv2 entries, or plain rows with the columns of any other format. Raises DataError."""
    try:
        entries = parse_json(read_text(file))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}); for one object per line use the ending .jsonl") from error
    if not isinstance(entries, list) or not any(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{file} must be a non-empty list of objects ({NEEDED})")
    ranked = any(isinstance(entry.get(name), list) for entry in entries if isinstance(entry, dict) for name in IMAGES)
    rows: list[dict[str, Any]] = []
    wheres, faults, chosen = [], {}, []
    for number, entry in enumerate(entries):
        where = f"{file.name} entry {number}"
        fault = _fault(entry, ranked)
        if fault or not ranked:
            if fault:
                faults[len(rows)] = fault
            rows.append({} if fault else entry)
            wheres.append(where)
            chosen.append(tuple(PAIRS_OF_RANKING))
            continue
        kinds = _kinds(entry)
        for first, second in combinations(range(len(_paths(entry))), 2):
            rows.append(_row(entry, first, second, file))
            wheres.append(f"{where} images {first}, {second}")
            chosen.append(("all", *(kind for kind, pairs in kinds.items() if {first, second} in pairs)))
    if not ranked:
        return ListColumns(rows, wheres, storage=file.name, base=file.parent, faults=faults)
    return RankedColumns(rows, wheres, chosen, file, faults)


class RankedColumns(ListColumns):
    """The pairs of rankings."""

    def __init__(
        self,
        rows: list[dict[str, Any]],
        wheres: list[str],
        chosen: list[tuple[str, ...]],
        file: Path,
        faults: dict[int, str],
    ) -> None:
        """chosen: for each row, which choices of `PAIRS_OF_RANKING` it belongs to."""
        super().__init__(rows, wheres, storage=file.name, base=file.parent, faults=faults)
        self.parts = rows, wheres, chosen, file, faults

    def only(self, choice: str) -> RankedColumns:
        """The pairs of one choice, and the entries with a fault."""
        rows, wheres, chosen, file, faults = self.parts
        places = [row for row, choices in enumerate(chosen) if choice in choices]
        return RankedColumns(
            [rows[i] for i in places],
            [wheres[i] for i in places],
            [chosen[i] for i in places],
            file,
            {new: faults[i] for new, i in enumerate(places) if i in faults},
        )


def _kinds(entry: dict[str, Any]) -> dict[str, list[set[int]]]:
    """The pairs of an entry's images by choice; of images that are equally good the first is best, the last worst."""
    order: Any = entry.get("human_preference", entry.get("rank"))
    if not all(isinstance(x, int) or (isinstance(x, float) and math.isfinite(x)) for x in order):
        return {kind: [] for kind in PAIRS_OF_RANKING}  # the rows are dropped, with the reason
    sign = -1 if "human_preference" in entry else 1
    best_first = sorted(range(len(order)), key=lambda i: (sign * order[i], i))
    adjacent = [{one, two} for one, two in pairwise(best_first)]
    return {"best_worst": [{best_first[0], best_first[-1]}], "adjacent": adjacent}


def _paths(entry: dict[str, Any]) -> Any:
    return next((entry[name] for name in IMAGES if name in entry), [])


def _fault(entry: Any, ranked: bool) -> str | None:
    if not isinstance(entry, dict):
        return f"a JSON {type(entry).__name__}; write an object"
    if not ranked:
        return None
    order = entry.get("human_preference", entry.get("rank"))
    if "prompt" not in entry or not isinstance(order, list):
        return f"has the fields {sorted(entry)}; required: {NEEDED}"
    paths = _paths(entry)
    if not isinstance(paths, list):
        return f"its image paths are {paths!r:.60}; required: {NEEDED}"
    if len(paths) != len(order) or len(paths) < 2:
        return (
            f"{len(paths)} image paths for {len(order)} preferences; each image needs one, and there "
            "must be at least two images"
        )
    return None


def _row(entry: dict[str, Any], first: int, second: int, file: Path) -> dict[str, Any]:
    paths = _paths(entry)
    row = {
        "prompt": entry["prompt"],
        "image_0": _beside(paths[first], file),
        "image_1": _beside(paths[second], file),
        **{part: entry[part] for part in TERMS if part in entry},
    }
    if "human_preference" in entry:
        a, b = entry["human_preference"][first], entry["human_preference"][second]
    else:
        a, b = entry["rank"][second], entry["rank"][first]  # rank 1 is the best
    if all(isinstance(x, int) or (isinstance(x, float) and math.isfinite(x)) for x in (a, b)):
        label = 0.5 if a == b else float(a > b)
        return row | {"label_0": label, "label_1": 1 - label}
    return row | {"label_0": a, "label_1": b}


def _beside(path: Any, file: Path) -> Any:
    """A path as written, or below the folder that has the name of the json where only that is there."""
    if not isinstance(path, str) or odd(path):
        return path  # its row is dropped, with the reason
    in_folder = f"{file.stem}/{path}"
    there = [os.path.exists(file.parent / each) for each in (path, in_folder)]
    return in_folder if there == [False, True] else path
