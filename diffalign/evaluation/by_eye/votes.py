"""The votes of one annotator: a file to which lines are appended, each on the disk before it is acknowledged.

A line of NAME.jsonl is one event, a vote or the withdrawal of the last one:

    {"event": "5f0c…", "pair": "9a31…", "vote": "first", "left": 1, "seconds": 2.4, "time": "2026-11-29T19:20:31Z"}

`vote` is first, second, tie, skip or undo; first and second are the sides of the pair as the plan lists them, `left` is
the side that stood on the left, 0 or 1. An event that comes again, as after a lost answer, is not written again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from diffalign.errors import DiffalignError
from diffalign.io.files import sync_folder

log = logging.getLogger(__name__)

Choice = Literal["first", "second", "tie", "skip"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
UNDO = "undo"
SUFFIX = ".jsonl"
POOLED = "all"  # in tables: the votes of all annotators together
MAJORITY = "majority"  # of labels: those that most annotators gave
RESERVED = (POOLED, MAJORITY)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_DEVICE = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]", re.IGNORECASE)  # of Windows, where no file is called so
_EVENT = re.compile(r"[A-Za-z0-9-]{8,64}")


@dataclass(frozen=True)
class Event:
    """One line of the file."""

    event: str  # made by the page; the same for a request that is sent again
    pair: str  # id of a comparison
    vote: str  # a Choice, or undo: the vote on `pair`, the last one, is withdrawn
    left: int  # side that stood on the left, 0 or 1
    seconds: float  # for which the pair was on the screen
    time: str  # UTC


class StaleError(DiffalignError):
    """A vote on a pair that has one, or an undo of a vote that is not the last: another window was faster."""


def check_annotator(name: str) -> str:
    """The name. Raises DiffalignError for one that is no file name on every system, or that means several."""
    if name in RESERVED:
        raise DiffalignError(f"annotator {name!r} means the votes of several people; give another name")
    if not _NAME.fullmatch(name) or _DEVICE.fullmatch(name):
        raise DiffalignError(
            f"annotator {name[:60]!r}: give 1 to 40 letters, digits, - or _, the first a letter or digit, and no "
            f"device of Windows (con, nul); the votes are stored as NAME{SUFFIX}"
        )
    return name


def votes_file(folder: Path, annotator: str) -> Path:
    """The file of an annotator's votes. Raises DiffalignError where there is one whose name differs in case alone."""
    file = folder / f"{check_annotator(annotator)}{SUFFIX}"
    for other in folder.glob(f"*{SUFFIX}"):
        if other.name != file.name and other.name.casefold() == file.name.casefold():
            raise DiffalignError(
                f"annotator {annotator!r}: {other} has the votes of {other.name.removesuffix(SUFFIX)!r}, which some "
                "systems do not tell apart; give that name, or another one"
            )
    return file


def now() -> str:
    """The time as an event has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class VoteLog:
    """The events of one annotator in their order, and the votes that stand.

    Opening cuts off a last line without an end: it was being written when the process was killed, so it was never
    acknowledged. Raises DiffalignError naming file and line for any other line that is not an event.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        new = not file.exists()
        self._opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if new:
                sync_folder(file.parent)
            self._cut_torn_line()
            self.events, self.standing = replay(file)
        except BaseException:
            self.close()
            raise

    def add(self, event: Event) -> bool:
        """Stores an event; returns when it is on the disk. False where it was stored before.

        Raises StaleError for a second vote on a pair and for an undo that is not of the last vote, and DiffalignError
        for an id that was used for another vote. After an OSError, as of a full disk, the file is as it was.
        """
        if (known := self.events.get(event.event)) is not None:
            if (known.pair, known.vote) != (event.pair, event.vote):
                raise DiffalignError(f"event {event.event!r} was used for another vote; reload the page")
            return False
        check_order(event, self.standing)
        self._write(json.dumps(asdict(event), ensure_ascii=False).encode() + b"\n")
        self.events[event.event] = event
        _take(event, self.standing)
        return True

    @property
    def last(self) -> Event | None:
        """The last vote that stands."""
        return next(reversed(self.standing.values()), None)

    def close(self) -> None:
        """Closes the file; a later `add` raises OSError."""
        if self._opened >= 0:
            os.close(self._opened)
            self._opened = -1

    def _write(self, line: bytes) -> None:
        size = os.fstat(self._opened).st_size
        try:
            rest = line
            while rest:
                rest = rest[os.write(self._opened, rest) :]
            os.fsync(self._opened)
        except OSError:
            os.ftruncate(self._opened, size)
            raise

    def _cut_torn_line(self) -> None:
        raw = self.file.read_bytes()
        end = raw.rfind(b"\n") + 1
        if end < len(raw):
            log.warning("%s: a vote was being written when the server was killed; it was not stored", self.file)
            os.ftruncate(self._opened, end)
            os.fsync(self._opened)


def read_events(file: Path) -> Iterator[tuple[int, Event]]:
    """(line, event) of a file; a last line without an end is not an event. Raises DiffalignError for other lines."""
    raw = file.read_bytes()
    for number, line in enumerate(raw[: raw.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DiffalignError(f"{file}, line {number}: not JSON ({error}); restore the file") from None
        if not isinstance(row, dict) or (fault := event_fault(row)):
            reason = fault if isinstance(row, dict) else "not an object"
            raise DiffalignError(f"{file}, line {number}: not a vote ({reason}); restore the file")
        yield number, Event(**row)


def event_fault(row: dict[str, Any]) -> str | None:
    """Why the fields are not those of an event; None if they are."""
    kinds = get_type_hints(Event)
    if row.keys() != kinds.keys():
        return f"it has {', '.join(map(str, row)) or 'nothing'} where {', '.join(kinds)} are needed"
    for name, kind in kinds.items():
        allowed = (int, float) if kind is float else kind
        if not isinstance(row[name], allowed) or isinstance(row[name], bool):
            return f"{name} is {row[name]!r:.60}"
    if row["vote"] not in (*CHOICES, UNDO) or row["left"] not in (0, 1) or not _EVENT.fullmatch(row["event"]):
        return f"vote {row['vote']!r:.20}, left {row['left']!r:.20}, event {row['event']!r:.80}"
    if not 0 <= row["seconds"] < 1e9:  # NaN is not
        return f"seconds is {row['seconds']}"
    return None


def replay(file: Path) -> tuple[dict[str, Event], dict[str, Event]]:
    """The events of a file by their id, and the votes that stand by pair, oldest first.

    Raises DiffalignError naming the line of a vote on a pair that has one, or of an undo that is not of the last vote.
    """
    events: dict[str, Event] = {}
    standing: dict[str, Event] = {}
    for number, event in read_events(file):
        try:
            check_order(event, standing)
        except StaleError as error:
            raise DiffalignError(f"{file}, line {number}: {error}; restore the file") from None
        events[event.event] = event
        _take(event, standing)
    return events, standing


def check_order(event: Event, standing: dict[str, Event]) -> None:
    """Raises StaleError where an event cannot follow the votes that stand."""
    if event.vote == UNDO:
        if next(reversed(standing), None) != event.pair:
            raise StaleError(f"the vote on pair {event.pair} is not the last one, and only the last can be undone")
    elif event.pair in standing:
        raise StaleError(f"pair {event.pair} has a vote already")


def _take(event: Event, standing: dict[str, Event]) -> None:
    if event.vote == UNDO:
        del standing[event.pair]
    else:
        standing[event.pair] = event


def read_votes(folder: Path) -> dict[str, dict[str, Event]]:
    """The votes that stand, by annotator and pair, of every annotator in a folder who judged something, by name.

    Nothing is changed. Raises DiffalignError as `VoteLog` does.
    """
    found = {}
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        if standing := replay(file)[1]:
            found[check_annotator(file.name.removesuffix(SUFFIX))] = standing
    return found
