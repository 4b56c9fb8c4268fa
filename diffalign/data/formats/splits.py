"""The files of a folder that belong to a split, by their names.

A split is a word of a file's name or of a folder's, in any case: `train-00000-of-00004.parquet`, `data/Test/a.tar`,
`pairs_holdout.jsonl`. Pick-a-Pic's `validation_unique` and `test_unique` are splits of their own. The file's own name
counts before its folders'.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from diffalign.data.row import DataError

log = logging.getLogger(__name__)

ALL = "train"  # the default split: every file, where no name states a split
ALIKE = {  # words for one split
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
    "eval": ("eval", "evaluation"),
    "dev": ("dev",),
    "holdout": ("holdout", "held_out", "heldout"),
}
_WORDS = sorted((word for words in ALIKE.values() for word in words), key=len, reverse=True)
_SPLIT = re.compile(rf"(?<![a-z0-9])(?:{'|'.join(_WORDS)})(?:_unique)?(?![a-z0-9])")


def of_split(files: Sequence[Path], folder: Path, split: str) -> list[Path]:
    """The files of a split; all files when no name states a split. Raises DataError."""
    words = {file: _word(file.relative_to(folder), split.lower()) for file in files}
    stated = sorted({word for word in words.values() if word is not None})
    alike = next((each for each in ALIKE.values() if split.lower() in each), ())
    wanted = [split.lower()] if split.lower() in stated else [word for word in stated if word in alike]
    if not stated:
        has_no_splits(folder, split)
        return list(files)
    if len(wanted) != 1:
        raise DataError(f"{folder} has no files of split {split!r}; it has {stated}: set split to one of these")
    unnamed = [file.name for file, word in words.items() if word is None]
    if unnamed:
        log.warning("%s: left out, since their names contain no split and others' do: %s", folder, unnamed[:8])
    return [file for file, word in words.items() if word == wanted[0]]


def has_no_splits(place: Path, split: str) -> None:
    """Raise DataError when a split was asked for where there are none; "train", the default, is everything."""
    if split != ALL:
        raise DataError(f"{place} has no splits, and split {split!r} was requested; remove split to read all of it")


def _word(path: Path, split: str) -> str | None:
    """The split that a path states, or None. Raises DataError where one name states two."""
    asked = re.compile(rf"(?<![a-z0-9]){re.escape(split)}(?![a-z0-9_])")
    for name in (path.stem, *reversed(path.parent.parts)):
        found = set(_SPLIT.findall(name.lower()))
        if split not in found and not any(split in words for words in ALIKE.values()) and asked.search(name.lower()):
            return split  # a name of the data's own, such as train_prefs
        if len(found) > 1:
            raise DataError(f"{path}: its name contains the splits {sorted(found)}; rename it, so that it contains one")
        if found:
            return found.pop()
    return None
