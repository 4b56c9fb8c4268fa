"""One writer to a folder at a time: a lock file that names its owner and ends with it.

    with folder_lock(Path("runs/mine"), "a run"):
        ...

`FOLDER/.diffalign.lock` names the process that writes there (host, pid, start, boot, command). The operating system's
own lock on that file (flock) ends with the process, so the next process takes over after a crash, with a message. Where
a file system has no such locks, an owner counts as ended if its pid is gone on this machine. The state of an owner on
another machine is unknown: the folder is refused, and the message says which file to remove.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

LOCK_FILE = ".diffalign.lock"
UNREADABLE = {"host": "an unknown machine"}  # the owner in a file that does not say it
SETTLED = 1.0  # seconds: an owner has written its name by then
_owned: dict[Path, int] = {}  # lock files of this process, as they are open


class FolderInUseError(DiffalignError):
    """Another process writes to this folder, or may do so."""


@contextmanager
def folder_lock(folder: Path, what: str, name: str = LOCK_FILE) -> Iterator[None]:
    """Owns the lock `name` in `folder` within the block; a folder made for it is removed again if it stays empty.

    A process that has the lock already may enter again. `what` names the owner in the messages of other processes.
    Raises FolderInUseError, and DiffalignError when `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise DiffalignError(f"{folder} is a file; name a folder")
    file = folder.resolve() / name
    if file in _owned:
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    _owned[file] = _acquire(file, what)
    try:
        yield
    finally:
        owned = _owned.pop(file)
        with suppress(OSError):
            file.unlink()
        os.close(owned)
        if made:
            with suppress(OSError):
                file.parent.rmdir()  # only where nothing was written


def folder_in_use(folder: Path) -> bool:
    """Whether a process writes to the folder now, or may do so on another machine. Takes no lock, changes nothing."""
    if folder.resolve() / LOCK_FILE in _owned:
        return True
    try:
        opened = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        owner = _read(opened)
    finally:
        os.close(opened)
    return not _ended(owner, flock=False)


def _acquire(file: Path, what: str) -> int:
    """The open lock file, with this process as its owner."""
    while True:
        opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locked = _flock(opened)
            if not _same_file(opened, file):  # its owner has just ended and removed it
                os.close(opened)
                continue
            owner = _read(opened)
            if locked and owner == UNREADABLE:  # torn by a loss of power, or being written this moment
                time.sleep(SETTLED)
                if (owner := _read(opened)) == UNREADABLE:
                    log.warning("%s does not name its owner, who was killed; this process takes over the folder", file)
                    owner = {}
            if locked is False or (owner and not _ended(owner, locked is True)):
                raise FolderInUseError(_in_use(file, owner))
            if owner:
                log.warning("%s: %s was killed; this process takes over its folder", file.parent, _name(owner))
            text = json.dumps({**_self(), "what": what, "command": " ".join(sys.argv)[:200]}) + "\n"
            os.ftruncate(opened, 0)
            os.lseek(opened, 0, os.SEEK_SET)
            os.write(opened, text.encode())
            os.fsync(opened)
        except BaseException:
            os.close(opened)
            raise
        return opened


def _flock(opened: int) -> bool | None:
    """Whether this process has the system's lock; None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _same_file(opened: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened), file.stat())
    except FileNotFoundError:
        return False


def _read(opened: int) -> dict[str, Any]:
    """The owner that the file names; empty for a new file."""
    os.lseek(opened, 0, os.SEEK_SET)
    text = os.read(opened, 4096).decode(errors="replace").strip()
    with suppress(ValueError):
        owner = json.loads(text or "{}")
        if isinstance(owner, dict):
            return owner
    return UNREADABLE


def _ended(owner: dict[str, Any], flock: bool) -> bool:
    """Whether the process that a file names has certainly ended."""
    ours = _self()
    if owner.get("boot") is not None and owner.get("boot") == ours["boot"]:
        if flock:  # one kernel, where its lock would exclude ours; also in another container
            return not (owner.get("host") == ours["host"] and _alive(owner))
        return owner.get("host") == ours["host"] and not _alive(owner)
    if owner.get("host") != ours["host"]:
        return False
    return (ours["boot"] is not None and owner.get("boot") is not None) or not _alive(owner)  # restarted, or gone


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the owner's pid exists and, where the system tells, began when the owner did."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False  # our own pid, and we have no lock: an earlier process had it
    if os.name == "nt":  # signal 0 is Ctrl-C there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    began = _began(pid)
    return began is None or owner.get("began") in (None, began)


def _self() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "began": _began(os.getpid()),
        "boot": _boot(),
    }


def _began(pid: int) -> int | None:
    """Clock ticks from the machine's start to the process's, as a pid may be used again; None if unknown."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _name(owner: dict[str, Any]) -> str:
    since = f", since {owner['since']}" if "since" in owner else ""
    return f"{owner.get('what', 'a process')} (pid {owner.get('pid', 'unknown')} on {owner.get('host')}{since})"


def _in_use(file: Path, owner: dict[str, Any]) -> str:
    if not owner:
        return f"{file.parent}: another process is taking this folder now; name another one, or try again"
    there = owner.get("host") == socket.gethostname()
    remedy = f"stop it with `kill {owner.get('pid')}`" if there else f"if it has ended (check there), remove {file}"
    return (
        f"{file.parent} is in use by {_name(owner)}: two writers would mix their files. Name another folder, "
        f"wait for its end, or {remedy} ({file} names the owner)"
    )


def _forget_in_child() -> None:
    """A forked loader worker must not own the lock of a parent that was killed."""
    for opened in _owned.values():
        with suppress(OSError):
            os.close(opened)
    _owned.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
