"""Files that are complete or absent, and lists of their hashes.

A file is written under a temporary name beside its place, flushed to the disk (fsync) and renamed. Where the disk is
full, an error names the path and the size needed, before anything is written if the size is known; no partial file
remains. Hashes are SHA-256.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError

PARTIAL = ".partial"  # ending of every temporary name
READERS = 8  # files hashed at a time; hashing releases the interpreter's lock
MARGIN = 1 << 20  # bytes required beyond the tensors: headers, configs, the file system's own
_MASK = os.umask(0)  # the system has no call that only reads it
os.umask(_MASK)
_FULL = ("no space left", "storagefull", "os error 28", "disk quota", "quotaexceeded", "os error 122")


class NoSpaceError(DiffalignError, OSError):
    """The disk has too little space for a file or folder."""


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process on any machine uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:12]}{PARTIAL}")


@contextmanager
def written_whole(path: Path, needed: int = 0, what: str = "", remedy: str = "") -> Iterator[Path]:
    """A temporary path for a file or folder, which replaces `path` when the block ends without an error.

    needed: bytes that will be written, as far as known. Raises NoSpaceError naming `what`, `path` and the size where
    the disk is full. After any error the temporary file is removed.
    """
    partial = temporary(path)
    try:
        with room_for(path, needed, what or path.name, remedy):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            share(partial)
            sync(partial)
        take_place(partial, path)
    finally:
        remove(partial)


def save_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, complete or not at all, in place of one that exists."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def take_place(partial: Path, path: Path) -> None:
    """Renames `partial` to `path`, and removes the file or folder that was there."""
    if path.is_dir():  # a folder cannot be renamed onto one that is not empty
        replaced = path.with_name(f".{path.name}.replaced")
        remove(replaced)
        path.rename(replaced)
        partial.rename(path)
        remove(replaced)
    else:
        os.replace(partial, path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def share(path: Path) -> None:
    """Gives a file, or each file of a folder, the permissions of any new file: safetensors' are its writer's alone."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~_MASK)


def sync(path: Path) -> None:
    """Flushes a file, or a folder with its content, to the disk."""
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            sync(inner)
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flushes a folder's list of entries, where the system supports that."""
    with suppress(OSError):  # Windows cannot open folders, and some network file systems cannot flush them
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def room_for(path: Path, needed: int, what: str, remedy: str = "") -> Iterator[None]:
    """Raises NoSpaceError where the disk of `path` has less than `needed` bytes free, before the block or in it."""
    need = needed + MARGIN if needed else 0
    free = free_bytes(path)
    if free < need:
        raise _no_space(path, need, free, what, remedy)
    try:
        yield
    except NoSpaceError:
        raise
    except Exception as error:
        if not _says_full(error) and free_bytes(path) >= max(need, 1):
            raise
        raise _no_space(path, need, free_bytes(path), what, remedy) from error


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of `path`, which need not exist yet."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def size_text(size: float) -> str:
    """A number of bytes with its unit, for messages."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("kiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def _no_space(path: Path, need: int, free: int, what: str, remedy: str) -> NoSpaceError:
    size = f"about {size_text(need)} needed, " if need else ""
    where = remedy or "free some space, or name a folder on another disk"
    return NoSpaceError(f"no space for {what} at {path}: {size}{size_text(free)} free on its disk; {where}")


def _says_full(error: BaseException) -> bool:
    """Whether an error, or one that led to it, means a full disk; libraries wrap it in classes of their own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(cause).lower() for words in _FULL):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def list_files(folder: Path, names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Size and hash of every file below a folder, or of the files and folders `names` in it, by relative path."""
    tops = sorted(folder.iterdir()) if names is None else [folder / name for name in names]
    files = [file for top in tops for file in (sorted(top.rglob("*")) if top.is_dir() else [top]) if file.is_file()]
    with ThreadPoolExecutor(READERS) as readers:
        hashes = list(readers.map(hash_file, files))
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": found}
        for file, found in zip(files, hashes, strict=True)
    }


def file_faults(folder: Path, listed: Mapping[str, Mapping[str, Any]], *, hashes: bool = True) -> list[str]:
    """Faults of the files in a list: missing, of another size, or (with `hashes`) of other content."""
    faults, same_size = [], []
    for name, facts in listed.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            faults.append(f"{name} is missing")
        elif size != facts["bytes"]:
            faults.append(f"{name} has {size} bytes of {facts['bytes']}")
        else:
            same_size.append(name)
    if hashes and not faults:
        with ThreadPoolExecutor(READERS) as readers:
            found = readers.map(lambda name: hash_file(folder / name), same_size)
            for name, each in zip(same_size, found, strict=True):
                if each != listed[name]["sha256"]:
                    faults.append(f"{name} has another content than was written (its SHA-256 differs)")
    return faults


def hash_file(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
