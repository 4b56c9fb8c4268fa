"""Hashes of image files, for data whose rows name files: has any changed since a cache was made?

Reading every file to learn that none has changed would cost more than the cache saves. So the hash of all contents
is remembered in the user's cache folder under the files' paths, sizes and times of change, and made anew when any of
these is another. Times decide only whether to read again, never the hash: a copy of the data has the same one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import time
import uuid
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.data.row import MISSING_SIDE, ImageError, ImageRef
from diffalign.io.progress import Progress

log = logging.getLogger(__name__)

READERS = 8  # files read at a time; hashing releases the interpreter's lock
AT_ONCE = 1024  # pairs that the readers get together
SETTLED = 2.0  # seconds: a younger file may change again without a change of its times, so it is not remembered


class Files:
    """The image files that pairs name, in the pairs' order, as they were when they were examined."""

    def __init__(self) -> None:
        self.pairs = 0
        self.state = ""  # hash of paths, sizes and times so far
        self.settled = True
        self.sizes = array("q")  # bytes of each file

    def add(self, paths: Sequence[str], stats: Sequence[os.stat_result]) -> None:
        """Notes the files of the next pair."""
        self.pairs += 1
        self.sizes.extend(stat.st_size for stat in stats)
        self.state, settled = _next_state(self.state, paths, stats)
        self.settled = self.settled and settled

    def contents(self, pairs: Iterable[tuple[ImageRef, ...]]) -> str:
        """Hash of the contents of the noted files, `pairs` in order; nothing is read where it is remembered.

        Raises ImageError for a file that was removed since.
        """
        note = remembered("contents") / self.state
        try:
            found = note.read_text()
        except OSError:
            found = ""
        if len(found) == 32:
            return found
        made = _hash(pairs, self.pairs)
        if self.settled:
            _remember(note, made)
        return made


def files_state(files: Sequence[Path]) -> str | None:
    """Hash of paths, sizes and times of some files; None where one may yet change without showing it."""
    state, settled = _next_state("", [str(file) for file in files], [file.stat() for file in files])
    return state if settled else None


def _next_state(state: str, paths: Sequence[str], stats: Sequence[os.stat_result]) -> tuple[str, bool]:
    """The hash with these files added, and whether all of them are settled."""
    facts, settled = [state], True
    for path, found in zip(paths, stats):
        facts += [path, str(found.st_size), str(found.st_mtime_ns), str(found.st_ctime_ns)]
        newest = max(found.st_mtime_ns, found.st_ctime_ns)
        settled = settled and time.time_ns() - newest > SETTLED * 1e9
    return hashlib.blake2b(os.fsencode("\0".join(facts)), digest_size=16).hexdigest(), settled


def file_stat(ref: ImageRef) -> os.stat_result:
    """Size and times of an image file. Raises ImageError ("missing side")."""
    try:
        found = os.stat(str(ref.path))
    except OSError as error:
        raise ImageError(
            MISSING_SIDE, f"{ref.where}: cannot read {ref.path} ({error.strerror}); restore the file"
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(MISSING_SIDE, f"{ref.where}: {ref.path} is not a file; write the path of an image")
    return found


def _hash(pairs: Iterable[tuple[ImageRef, ...]], total: int) -> str:
    """One hash over the hash of every file, side by side; a file in several pairs is read once."""
    total_hash = hashlib.blake2b(digest_size=16)
    known: dict[str, bytes] = {}
    rest = iter(pairs)
    with (
        ThreadPoolExecutor(READERS) as readers,
        Progress(total=total, desc="hashing image files", unit=" pairs", delay=3.0, mininterval=1.0) as bar,
    ):
        while some := list(islice(rest, AT_ONCE)):
            new = {str(ref.path): ref for pair in some for ref in pair if str(ref.path) not in known}
            known |= zip(new, readers.map(_hash_file, new.values()))
            for pair in some:
                for ref in pair:
                    total_hash.update(known[str(ref.path)])
            bar.update(len(some))
    return total_hash.hexdigest()


def _hash_file(ref: ImageRef) -> bytes:
    return hashlib.blake2b(ref.read(), digest_size=16).digest()


def remembered(kind: str) -> Path:
    """The user's cache folder for notes of one kind."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "diffalign", kind)


def recall_note(kind: str, state: str | None) -> Any:
    """What was noted about files in this state; None where nothing was, or the note is damaged."""
    if state is None:
        return None
    try:
        digest, _, text = (remembered(kind) / state).read_text().partition(" ")
        return json.loads(text) if digest == _digest(text) else None
    except (OSError, ValueError):
        return None


def write_note(kind: str, state: str | None, value: Any) -> None:
    """Notes JSON values about files in a state, as of `files_state`."""
    if state is not None:
        text = json.dumps(value)
        _remember(remembered(kind) / state, f"{_digest(text)} {text}")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _remember(note: Path, made: str) -> None:
    temporary = note.with_name(f".{note.name}.{uuid.uuid4().hex}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(made)
        os.replace(temporary, note)
    except OSError as error:
        log.warning("a note on the data files cannot be stored, so every start reads them again (%s)", error)
