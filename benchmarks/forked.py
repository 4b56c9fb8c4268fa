"""Commands of `diffalign` in forked children of a process that has imported everything, killed where one wants.

Importing torch and diffusers takes most of a short command's time, so a campaign of kills imports them once. A child
ends itself with SIGKILL at the n-th of its file operations (Python's audit events: opening to write, renaming,
removing, making folders, below its own folder), or is killed by its parent after some seconds.

A kill leaves what was handed to the system. `torn` leaves less, as a power cut does: of the file that was being written
when the process ended, and that nothing had flushed to the disk, a random part of what had been written last.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

IMPORTED = (
    "torch",
    "accelerate",
    "diffusers",
    "transformers",
    "peft",
    "datasets",
    "matplotlib.pyplot",
    "diffalign.cli.main",
    "diffalign.training.run",
    "diffalign.evaluation.evaluate",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.clip.modeling_clip",
)
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATIENCE = 1800.0  # seconds for a command, on a machine that may be busy


@dataclass(frozen=True)
class Death:
    """When a command is killed: so many seconds after its start, or before its n-th file operation (from 1)."""

    seconds: float | None = None
    operation: int | None = None
    torn: bool = False  # leave a random part of what was written last

    @property
    def kind(self) -> str:
        """Name in tables."""
        return "instant" if self.operation is None else "torn write" if self.torn else "file operation"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int  # of the first process that did not end well; -9: killed
    seconds: float
    operations: int  # of the first process
    log: Path


def import_all() -> None:
    """Imports what the commands import. No thread may run in this process afterwards, as it forks."""
    import torch

    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)


def in_child(work: Callable[[], object]) -> None:
    """Calls a function in a child. Raises RuntimeError where it fails; its traceback is on stderr."""

    def done() -> int:
        import traceback

        try:
            work()
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    if os.waitstatus_to_exitcode(os.waitpid(_fork(done), 0)[1]):
        raise RuntimeError(f"{work} failed in a child")


def run_forked(
    words: Sequence[str],
    place: Path,
    death: Death | None = None,
    processes: int = 1,
    environment: Mapping[str, str] = MappingProxyType({}),
    watch: type[Watch] | None = None,
) -> Ended:
    """`diffalign WORDS` in `place`, to its end or to its death, in one process or in several joined by gloo."""
    side, log, port = place.parent / f"{place.name}.side", place.parent / f"{place.name}.log", _free_port()
    side.unlink(missing_ok=True)
    began, death = time.monotonic(), death or Death()
    deaths = [death, *[Death()] * (processes - 1)]  # an operation is the first process's
    children = [
        _fork(partial(_command, words, place, log, (watch or Watch)(place, deaths[rank], side), joined))
        for rank, joined in enumerate(_joined(processes, port, environment))
    ]
    code = _wait(children, began, death.seconds)
    seconds = time.monotonic() - began
    told = json.loads(side.read_text()) if side.is_file() else {}
    if code == -signal.SIGKILL and death.torn and "path" in told:
        _tear(Path(told["path"]), told["before"], death)
    return Ended(code, seconds, told.get("operations", 0), log)


def _fork(work: Callable[[], int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        code = work()
    finally:
        os._exit(code)


def _wait(children: Sequence[int], began: float, seconds: float | None) -> int:
    """Waits for all; once one was killed, or has failed, the others are killed as a launcher does it."""
    running, code = set(children), 0
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.discard(pid)
                _kill_group(pid)  # workers of a loader
                code = code or os.waitstatus_to_exitcode(status)
        past = time.monotonic() - began
        if (seconds is not None and past > seconds) or code or past > PATIENCE:
            for pid in running:
                _kill_group(pid)
        if past > PATIENCE + 60:
            raise RuntimeError(f"processes {sorted(running)} do not end")
        time.sleep(0.002)
    return code


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _joined(processes: int, port: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """The variables of each process, as a launcher sets them."""
    if processes == 1:
        return [dict(environment)]
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**environment, **sizes, **place, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]


def _command(words: Sequence[str], place: Path, log: Path, watch: Watch, environment: Mapping[str, str]) -> int:
    """In the child: the command's exit status."""
    first = environment.get("RANK", "0") == "0"
    with log.open("w" if first else "a") as opened:
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["diffalign", *words]
    os.chdir(place)
    os.environ.update(environment)
    watch.pid = os.getpid()
    if first:
        sys.addaudithook(watch)
    from diffalign.cli.main import main

    code = 0
    try:
        main(list(words))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    if first:
        watch.note()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    return code


class Watch:
    """An audit hook that counts a process's file operations below a folder and ends it at one of them."""

    def __init__(self, place: Path, death: Death, side: Path) -> None:
        self.root, self.death, self.side = f"{place.resolve()}{os.sep}", death, side
        self.count, self.pid, self.busy = 0, os.getpid(), False
        self.writing: tuple[str, int] | None = None  # the file to tear, and its size before

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Called by Python for every audit event."""
        if self.busy or os.getpid() != self.pid:
            return
        if (path := self.changed(event, arguments)) is None:
            return
        if self.writing is not None:
            self._end()
        self.count += 1
        if self.count == self.death.operation:
            if self.death.torn and event == "open":
                there = os.path.getsize(path) if os.path.isfile(path) else 0
                flushing = not arguments[2] & WRITING  # opened to be flushed: written by then, by whatever library
                self.writing = (path, 0 if flushing or arguments[2] & os.O_TRUNC else there)
                if not flushing:
                    return
            self._end()

    def changed(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        """The path below the folder that an event changes, or None for any other event."""
        if (event != "open" and event not in CHANGES) or not isinstance(arguments[0], str | os.PathLike):
            return None
        path = os.path.abspath(arguments[0])
        if not path.startswith(self.root):
            return None
        return None if event == "open" and not self._writes(path, arguments[2]) else path

    def _writes(self, path: str, flags: int) -> bool:
        return bool(flags & WRITING) or ".partial" in path[len(self.root) :]

    def note(self) -> None:
        """Leaves the count, and the file to tear, for the parent."""
        self.busy = True
        torn = {} if self.writing is None else {"path": self.writing[0], "before": self.writing[1]}
        self.side.write_text(json.dumps({"operations": self.count, **torn}))

    def _end(self) -> None:
        self.note()
        os.kill(os.getpid(), signal.SIGKILL)


def _tear(path: Path, before: int, death: Death) -> None:
    """Cuts a file within what was written to it last."""
    import random

    if path.is_file() and (size := path.stat().st_size) > before:
        os.truncate(path, random.Random(f"{path.name} {death.operation}").randrange(before, size))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
