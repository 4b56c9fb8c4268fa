"""The result of examining a large data set, stored: rows are examined once, not at every start.

A note is in the user's cache folder under the storage's paths, sizes and times of change, the settings that the data
were opened with, and the code that examines them. When any of these changes, the rows are examined anew. Only storages
that contain their images have notes (parquet, Arrow, tar): files that rows name could change without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from array import array
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.data.formats.columns import Columns
from diffalign.data.remote_shards import RemoteParquet
from diffalign.data.row import Problem
from diffalign.data.table.examine import Index
from diffalign.data.table.file_hash import files_state, recall_note, remembered, write_note
from diffalign.data.table.texts import Texts
from diffalign.io.files import sync
from diffalign.io.weight_files import EMPTY_STAMP, stamp, stamp_fault

log = logging.getLogger(__name__)

FORMAT_VERSION = 5
FROM_ROWS = 10_000  # below, examining takes a second or two
_FACTS = ("problems", "hashes", "names_files", "negative_masks", "examined_rows")
_PACKED = ("ids", "prompts")
_TYPES = {"i": torch.int32, "q": torch.int64, "d": torch.float64}  # of array codes


def remembered_at(stored: Columns, settings: dict[str, Any]) -> Path | None:
    """The file of the note on some rows opened with some settings; None for rows that have none."""
    if len(stored) < FROM_ROWS or not stored.files:
        return None
    state = stored.state if isinstance(stored, RemoteParquet) else files_state(stored.files)
    if state is None:
        return None
    facts = json.dumps([FORMAT_VERSION, _code(), state, len(stored), settings], sort_keys=True)
    return remembered("tables") / f"{hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()}.safetensors"


@cache
def _code() -> str:
    """Hash of this package's source: another version may judge rows otherwise."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def remember(note: Path, index: Index) -> None:
    """Writes an index that is packed; where that fails a warning is logged, and the next start examines the rows."""
    facts = {name: getattr(index, name) for name in _FACTS}
    facts["problems"] = [astuple(problem) for problem in index.problems]
    tensors = {
        "facts": torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8),
        "first": torch.tensor(list(index.first), dtype=torch.uint8),
        "ties": torch.tensor(list(index.ties), dtype=torch.uint8),
        "sizes": _tensor(index.sizes),
        "rows": _tensor(index.rows),
        **{f"numbers.{part}": _tensor(values) for part, values in index.numbers.items()},
    }
    for name in _PACKED:
        texts = getattr(index, name)
        parts = {"content": texts.content, "ends": texts.ends, "places": texts.places}
        tensors |= {f"{name}.{part}": value for part, value in parts.items() if value is not None}
    if index.scores is not None:
        tensors["scores"] = torch.tensor(index.scores, dtype=torch.float64).reshape(-1, 2)
    partial = note.with_name(f".{note.name}.{uuid.uuid4().hex}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"sha256": EMPTY_STAMP})
        stamp(partial)
        sync(partial)
        os.replace(partial, note)
    except (OSError, SafetensorError) as error:
        log.warning("the index of the data cannot be stored, so every start examines the rows again (%s)", error)
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def recall(note: Path) -> Index | None:
    """The index that was written, or None where there is no complete one."""
    try:
        state = files_state([note])
        if not recall_note("checked", state):  # else its hash was right, and it has not been written since
            if stamp_fault(note) is not None:
                return None
            write_note("checked", state, True)
        with safe_open(note, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        facts, scores = json.loads(bytes(tensors["facts"].numpy())), tensors.get("scores")
        numbers = {name.partition(".")[2]: x for name, x in tensors.items() if name.startswith("numbers.")}
        return Index(
            **facts | {"problems": [Problem(*problem) for problem in facts["problems"]]},
            ids=_texts(tensors, "ids"),
            prompts=_texts(tensors, "prompts"),
            first=bytearray(tensors["first"].numpy()),
            ties=bytearray(tensors["ties"].numpy()),
            sizes=_array("i", tensors["sizes"]),
            rows=_array("q", tensors["rows"]),
            scores=None if scores is None else [(one, two) for one, two in scores.tolist()],
            numbers={part: _array("d", x) for part, x in numbers.items()},
        )
    except (OSError, SafetensorError, KeyError, IndexError, ValueError, TypeError):
        return None


def _texts(tensors: Mapping[str, Tensor], name: str) -> Texts:
    return Texts(tensors[f"{name}.content"], tensors[f"{name}.ends"], tensors.get(f"{name}.places"))


def _tensor(values: array[Any]) -> Tensor:
    return torch.tensor(values.tolist(), dtype=_TYPES[values.typecode])


def _array(code: str, values: Tensor) -> array[Any]:
    return array(code, values.numpy().tobytes())
