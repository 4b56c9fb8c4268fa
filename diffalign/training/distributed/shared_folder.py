"""Whether all processes of a run see the same folder, found out with a small file before any work is spent."""

from __future__ import annotations

import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffalign.config.schema import AnyConfig, Config
from diffalign.data.cache.latents import read_cache_manifest
from diffalign.errors import DiffalignError
from diffalign.training.processes import on_main

COPIES = ", or copy the complete cache to each machine"
PATIENCE = 20.0  # seconds for a new file to appear: network file systems list a folder anew after some seconds


def check_shared(config: AnyConfig, accelerator: Any) -> None:
    """Raises DiffalignError where the output folder or the cache of a run is not one folder for all processes."""
    data = config.data
    require_shared(Path(config.output_dir), accelerator, "output_dir")
    if isinstance(config, Config) and data.cache_dir is not None:
        recorded = data.cache_trajectories or data.cache_reference_errors
        require_shared(Path(data.cache_dir), accelerator, "data.cache_dir", copies=not recorded)


def require_shared(folder: Path, accelerator: Any, key: str, *, copies: bool = False) -> None:
    """Every process calls it. Raises DiffalignError in all of them where one does not see the main process's folder.

    copies: a complete latent cache may be a copy on each machine, as nothing is written there.
    """
    if accelerator.num_processes == 1:
        return
    import torch

    token, main = on_main(accelerator, lambda: (_put(folder), socket.gethostname()))
    mine = (socket.gethostname(), _sees(folder / token), copies and _complete_cache(folder))
    found: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(found, mine)
    if accelerator.is_main_process:
        with suppress(OSError):
            (folder / token).unlink()
            folder.rmdir()  # only where nothing else is there
    blind = sorted({host for host, sees, _ in found if not sees})
    if blind and not all(complete for _, _, complete in found):
        raise DiffalignError(
            f"{key}: {folder} is not one folder for all processes: a file that {main} wrote there is not seen on "
            f"{', '.join(blind)}. Name a folder on a file system that all machines share{COPIES if copies else ''}"
        )


def _put(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    token = f".shared-{uuid.uuid4().hex}.partial"  # named as what a kill may leave and nothing reads
    (folder / token).touch()
    return token


def _sees(file: Path) -> bool:
    end = time.monotonic() + PATIENCE
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
        with suppress(OSError):
            os.listdir(file.parent)  # an NFS client asks its server again
    return True


def _complete_cache(folder: Path) -> bool:
    with suppress(DiffalignError, OSError):  # a damaged one is reported where the cache is opened
        found = read_cache_manifest(folder)
        return found is not None and not found[1].missing(folder)
    return False
