"""Two processes joined by gloo, forked from this one: torch is imported already, so that they cost next to nothing."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState

Work = Callable[[PartialState, Path], None]  # and a folder of this test


def in_two(work: Work, folder: Path) -> list[tuple[int, str]]:
    """Exit status of each process (-9: killed), and what it wrote to stderr and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=_one, args=(work, folder, rank, port)) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()
    return [(int(p.exitcode or 0), (folder / f"{rank}.err").read_text()) for rank, p in enumerate(started)]


def _one(work: Work, folder: Path, rank: int, port: int) -> None:
    file = os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that was forked
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
    accelerator = PartialState(cpu=True)
    code = 0
    try:
        work(accelerator, folder)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)
