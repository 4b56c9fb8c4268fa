"""Folders of safetensors shards that several processes and runs may fill at once, and read by memory map.

Runs that fill one folder at the same time do not talk to each other: each takes the shards in an order of its
own and leaves out those that have appeared, so they seldom make the same one, and then harmlessly.
"""

from __future__ import annotations

import os
import random
import socket
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"
SHARD_BYTES = 256 << 20
OPEN_SHARDS = 64  # memory maps held by each process
ABANDONED = 6 * 3600  # seconds after which a temporary file belongs to a killed process, wherever that ran


class OpenShards:
    """The shards of a folder by name, the latest ones kept open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __getitem__(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, "pt")
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]

    def __len__(self) -> int:
        return len(self._open)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # memory maps are opened anew in each loader worker


def in_own_order(folder: Path, names: list[str]) -> Iterator[tuple[str, bool]]:
    """The shards and whether each is still missing when its turn comes; those that are there first."""
    there = {file.name for file in folder.iterdir()}
    yield from ((name, False) for name in names if name in there)
    todo = [name for name in names if name not in there]
    random.Random(uuid.uuid4().int).shuffle(todo)
    yield from ((name, not (folder / name).exists()) for name in todo)


def write_shard(folder: Path, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """The shard appears whole or not at all."""
    temporary = temporary_name(folder, name)
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata=metadata)
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)


def write_manifest(folder: Path, text: str) -> None:
    """Writes the folder's manifest unless another run was quicker; what is there afterwards is what counts."""
    temporary = temporary_name(folder, MANIFEST)
    temporary.write_text(text)
    try:
        os.link(temporary, folder / MANIFEST)  # unlike a rename, fails when another run was quicker
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.replace(temporary, folder / MANIFEST)
    temporary.unlink(missing_ok=True)


def temporary_name(folder: Path, name: str) -> Path:
    """A name that no other process on any machine uses."""
    return folder / f".{name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}"


def sweep(folder: Path) -> None:
    """Remove what killed processes left. Younger temporary files may be another run's, which is writing them."""
    for file in [*folder.glob(".*.safetensors.*"), *folder.glob(f".{MANIFEST}.*")]:
        try:
            if time.time() - file.stat().st_mtime > ABANDONED:
                file.unlink()
        except FileNotFoundError:
            continue  # that run has finished it, or swept it first
