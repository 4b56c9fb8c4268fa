"""What one process of a run tells the others about itself: who it is, where its training is, whether it waits.

The place is read from the interpreter's frames by another thread, so the training itself does nothing for it.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).parents[2]
# files of torch and accelerate in which a thread waits for other processes or for its device
_WAITING = ("torch/distributed/", "torch/autograd/graph.py", "torch/cuda/streams.py", "accelerate/utils/operations.py")
_work: list[str] = []  # what this process does now and others may wait for, outermost first


@contextmanager
def long_work(what: str) -> Iterator[None]:
    """Within the block the other processes of the run have more patience with this one."""
    _work.append(what)
    try:
        yield
    finally:
        _work.pop()


@dataclass(frozen=True)
class Signs:
    """What is known of a process at one beat."""

    rank: int
    host: str
    pid: int
    home: str  # within which the pid names the process; empty where the system does not tell
    beat: int = 0
    step: int = 0
    place: str = ""  # file:line and function of diffalign, innermost
    waits: bool = False
    still: int = 0  # beats since the frames of its training last changed
    work: str = ""
    ended: bool = False

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def doing(self) -> str:
        """Where it is, for a message."""
        return f"step {self.step}, {self.place or 'outside of diffalign'}{f', {self.work}' if self.work else ''}"


def own_signs(rank: int) -> Signs:
    """Of this process, before the first beat."""
    host = socket.gethostname()
    try:
        home = (
            f"{host} {os.readlink('/proc/self/ns/pid')} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
        )
    except OSError:
        home = ""
    return Signs(rank, host, os.getpid(), home)


class Frames:
    """Looks at the frames of the thread that trains."""

    def __init__(self, thread: int) -> None:
        """thread: its identity, `threading.get_ident()`."""
        self.thread = thread
        self.last: tuple[tuple[int, int], ...] = ()
        self.still = 0

    def look(self) -> dict[str, object]:
        """Place, whether it waits, and for how many calls of this its frames have been the same."""
        frame = sys._current_frames().get(self.thread)
        stack = list(_outwards(frame))
        now = tuple((id(each.f_code), each.f_lasti) for each in stack)
        self.still = self.still + 1 if now == self.last else 0
        self.last = now
        inner = stack[0].f_code.co_filename if stack else ""
        ours = next((f for f in stack if Path(f.f_code.co_filename).is_relative_to(PACKAGE)), None)
        place = ""
        if ours is not None:
            file = Path(ours.f_code.co_filename).relative_to(PACKAGE.parent)
            place = f"{file}:{ours.f_lineno} ({ours.f_code.co_name})"
        waits = any(part in inner.replace(os.sep, "/") for part in _WAITING)
        return {"place": place, "waits": waits, "still": self.still, "work": _work[-1] if _work else ""}


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_gone(signs: Signs, home: str) -> bool | None:
    """Whether a process has certainly ended; None where this machine cannot tell."""
    if not home or signs.home != home:
        return None
    try:
        state = Path(f"/proc/{signs.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in ("Z", "X")
