"""Files that are whole or not there, and that show when they are damaged.

What is written goes to a name of its own beside its place, is flushed to the disk (fsync) and renamed. A full disk is
an error that names the path and the size needed, before anything is written where the size is known, and it leaves
nothing behind. Hashes are SHA-256: of files in a list (`list_files`), or inside a safetensors file's own header
(`stamp`), where no second file can be lost or belong to another version of the first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
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
MARGIN = 1 << 20  # bytes asked for beyond the tensors: headers, configs, the file system's own
EMPTY_STAMP = "0" * 64
_STAMP = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own
_FULL = ("no space left", "storagefull", "os error 28", "disk quota", "quotaexceeded", "os error 122")


class NoSpaceError(DiffalignError, OSError):
    """A disk has no room for what is to be written."""


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process on any machine uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:12]}{PARTIAL}")


@contextmanager
def written_whole(path: Path, needed: int = 0, what: str = "", remedy: str = "") -> Iterator[Path]:
    """A temporary path for a file or folder, which takes the place of `path` when the block ends well.

    needed: bytes that will be written, as far as known. Raises NoSpaceError naming `what`, `path` and the size where
    the disk has no room; nothing stays behind then, nor after any other error.
    """
    partial = temporary(path)
    try:
        with room_for(path, needed, what or path.name, remedy):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            sync(partial)
        take_place(partial, path)
    finally:
        remove(partial)


def take_place(partial: Path, path: Path) -> None:
    """Renames `partial` to `path`, whose former file or folder it replaces."""
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
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file, or a folder with all that is in it, to the disk."""
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            sync(inner)
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flushes a folder's own entries, where the system can."""
    with suppress(OSError):  # Windows opens no folders, and some network file systems do not flush them
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def room_for(path: Path, needed: int, what: str, remedy: str = "") -> Iterator[None]:
    """Raises NoSpaceError where the disk of `path` has not `needed` bytes free, now or when the block fails for it."""
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
    """Bytes free on the disk that `path` is or will be on."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def size_text(size: float) -> str:
    """A number of bytes for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("kiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def _no_space(path: Path, need: int, free: int, what: str, remedy: str) -> NoSpaceError:
    size = f"about {size_text(need)} needed, " if need else ""
    where = remedy or "free some, or name a folder on another disk"
    return NoSpaceError(f"no space for {what} at {path}: {size}{size_text(free)} free on its disk; {where}")


def _says_full(error: BaseException) -> bool:
    """Whether an error, or one that led to it, is that of a full disk; libraries wrap it in classes of their own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(seen).lower() for words in _FULL):
            return True
        seen = seen.__cause__ or seen.__context__
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
    """What is wrong with the files of a list: missing, of another size, or (with `hashes`) of other content."""
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


def stamp(file: Path) -> None:
    """Writes a safetensors file's hash into its header, where its metadata has `sha256: EMPTY_STAMP`.

    The hash is that of the file with zeros in its place.
    """
    header = _header(file)
    place = header.find(f'"sha256":"{EMPTY_STAMP}"'.encode())
    assert place >= 0, f"{file} was saved without an empty stamp"
    digest = hash_file(file)
    with file.open("r+b") as opened:
        opened.seek(8 + place + len('"sha256":"'))
        opened.write(digest.encode())


def has_stamp(file: Path) -> bool:
    """Whether a safetensors file carries its hash; False also where it has no readable header."""
    try:
        return _STAMP.search(_header(file)) is not None
    except (OSError, ValueError):
        return False


def stamp_fault(file: Path, *, required: bool = True) -> str | None:
    """What is wrong with a safetensors file, or None: its header, its size, its hash.

    required: whether a file without a hash is damaged. If not, only header and size of such a file are looked at.
    """
    try:
        header = _header(file)
        listed = json.loads(header)
        ends = [facts["data_offsets"][1] for name, facts in listed.items() if name != "__metadata__"]
    except FileNotFoundError:
        return "it is missing"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return f"it has no readable header ({size_text(file.stat().st_size)})"
    size, whole = file.stat().st_size, 8 + len(header) + max(ends, default=0)
    if size != whole:
        return f"it has {size} bytes of {whole}"
    found = _STAMP.search(header)
    if found is None:
        return "it carries no hash" if required else None
    first = 8 + found.start(1)
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        digest.update(opened.read(first) + EMPTY_STAMP.encode())
        opened.seek(first + len(EMPTY_STAMP))
        while block := opened.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != found[1].decode():
        return "it has another content than was written (its SHA-256 differs)"
    return None


def _header(file: Path) -> bytes:
    """The JSON header of a safetensors file. Raises ValueError where there is none."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(_HEADER_LIMIT, file.stat().st_size - 8):
            raise ValueError("no header")
        return opened.read(length)
