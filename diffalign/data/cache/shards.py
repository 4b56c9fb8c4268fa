"""Folders of safetensors shards that several processes and runs may fill at once, and read by memory map.

Runs that fill one folder at the same time do not communicate: each takes the shards in an order of its own and skips
those that have appeared. They seldom make the same shard, and then both make the same file.

A shard carries its hash in its own header (`files.stamp`), and the manifest its own. Every run compares the shards it
finds with their hashes once, when it opens the folder: a damaged one is named in the log and made again. Folders from
before there were hashes are read with a warning; only headers and sizes show damage there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from diffalign.data.row import DataError
from diffalign.io.files import PARTIAL, READERS, room_for, sync, temporary
from diffalign.io.mapped_tensors import MappedTensors
from diffalign.io.progress import Progress
from diffalign.io.weight_files import EMPTY_STAMP, has_stamp, stamp, stamp_fault

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SHARD_BYTES = 256 << 20
OPEN_SHARDS = 64  # memory maps that each process has open
REMEDY = "free some, or set data.cache_dir to a folder on another disk; finished shards remain"
ABANDONED = 6 * 3600  # seconds after which a temporary file belongs to a killed process, wherever that ran


class OpenShards:
    """The shards of a folder by name; those used last stay open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[str, MappedTensors] = OrderedDict()

    def __getitem__(self, name: str) -> MappedTensors:
        if name not in self._open:
            self._open[name] = MappedTensors(self.folder / name)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]

    def __len__(self) -> int:
        return len(self._open)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # memory maps are opened anew in each loader worker


def fill(
    folder: Path,
    names: list[str],
    hashed: bool,
    title: str,
    make: Callable[[str], tuple[dict[str, Tensor], dict[str, str]]],
    found: Callable[[str], object] = str,
) -> int:
    """Makes the shards that are not there; returns how many. `make` gives tensors and metadata of a shard by its name.

    `found` is called with the name of each shard that is there. `hashed` as in `in_own_order`.
    """
    written = 0
    with Progress(total=len(names), desc=title, unit=" shards", delay=3.0, mininterval=1.0) as bar:
        for name, missing in in_own_order(folder, names, hashed):
            if missing:
                write_shard(folder, name, *make(name))
                written += 1
            else:
                found(name)
            bar.update(1)
    return written


def in_own_order(folder: Path, names: list[str], hashed: bool = True) -> Iterator[tuple[str, bool]]:
    """The shards and whether each is to be made when its turn comes; those that are complete first.

    hashed: whether all shards of this folder carry their hash. Damaged shards are removed and named in the log.
    """
    there = {file.name for file in folder.iterdir()}
    complete = _complete(folder, [name for name in names if name in there], hashed)
    yield from ((name, False) for name in names if name in complete)
    todo = [name for name in names if name not in complete]
    random.Random(uuid.uuid4().int).shuffle(todo)
    yield from ((name, not (folder / name).exists()) for name in todo)


def _complete(folder: Path, names: list[str], hashed: bool) -> set[str]:
    """The names of the shards that are undamaged. The others are removed."""
    complete, without = set(), 0
    with (
        ThreadPoolExecutor(READERS) as readers,
        Progress(total=len(names), desc="checking shards", unit=" shards", delay=3.0, mininterval=1.0) as bar,
    ):
        for name, fault in zip(names, readers.map(lambda n: stamp_fault(folder / n, required=hashed), names)):
            bar.update(1)
            if fault is None:
                complete.add(name)
                without += not hashed and not has_stamp(folder / name)
                continue
            log.warning("%s is damaged and is made again: %s", folder / name, fault)
            (folder / name).unlink(missing_ok=True)
    if without:
        log.warning(
            "%d shards in %s have no hashes (they are from an older version), so damage may go "
            "unnoticed. Delete the folder to have it made again",
            *(without, folder),
        )
    return complete


def write_shard(folder: Path, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a shard with its hash; it appears complete or not at all. Raises NoSpaceError with the size needed."""
    partial = temporary(folder / name)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        with room_for(folder / name, needed, "a shard of the cache", REMEDY):
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, partial, metadata={**metadata, "sha256": EMPTY_STAMP})
            stamp(partial)
            sync(partial)
        os.replace(partial, folder / name)
    finally:
        partial.unlink(missing_ok=True)


def require_room(folder: Path, needed: int, what: str, remedy: str = "") -> None:
    """Raises NoSpaceError where the disk of `folder` has not `needed` bytes free."""
    with room_for(folder, needed, what, remedy or REMEDY):
        pass


def manifest_text(content: dict[str, Any]) -> str:
    """The manifest's json, with its hash; equal for equal contents."""
    return json.dumps({**content, "sha256": _hash(content)}, indent=2) + "\n"


def read_content(folder: Path) -> tuple[dict[str, Any], bool] | None:
    """The content of a folder's manifest and whether it carries a hash, as its shards do then; None: no manifest.

    Raises DataError for one that is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        content = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} is not a manifest ({error}); delete {folder} to have it made again") from error
    stated = content.pop("sha256", None)
    if stated not in (None, _hash(content)):
        raise DataError(f"{file} is damaged (its SHA-256 differs); delete {folder} to have it made again")
    return content, stated is not None


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_cache_manifest(folder: Path, text: str) -> None:
    """Writes the folder's manifest unless another run was quicker; what is there afterwards is what counts."""
    partial = temporary(folder / MANIFEST)
    try:
        with room_for(folder / MANIFEST, 0, "a cache's manifest", REMEDY):
            partial.write_text(text)
            sync(partial)
        try:
            os.link(partial, folder / MANIFEST)  # unlike a rename, fails when another run was quicker
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(partial, folder / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left. Younger temporary files may be another run's, which is writing them."""
    for file in [*folder.glob(f".*{PARTIAL}"), *folder.glob(".*.safetensors.*"), *folder.glob(f".{MANIFEST}.*")]:
        try:
            if time.time() - file.stat().st_mtime > ABANDONED:
                file.unlink()
        except FileNotFoundError:
            continue  # that run has finished it, or swept it first


def not_finite(values: Tensor) -> list[int]:
    """The entries of the first axis that have a value which is not a finite number."""
    return (~values.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
