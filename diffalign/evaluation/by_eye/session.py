"""What one annotator sees and decides; the server and tests call the same functions.

A comparison is named by its place in the annotator's order. Names, ids and files of the images stay here.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from diffalign.errors import DiffalignError
from diffalign.evaluation.by_eye.plan import Material, order_of
from diffalign.evaluation.by_eye.votes import UNDO, Event, VoteLog, event_fault, now, votes_file

Key = Literal["left", "right", "tie", "skip"]
KEYS: tuple[Key, ...] = get_args(Key)
RECENT = 20  # votes that the remaining time is estimated from
ENCODED = 8  # images in memory: two pairs ahead and two behind
MOST_SECONDS = 1e6  # of one pair on the screen


class RequestError(DiffalignError):
    """A request that no page of ours makes."""


class Session:
    """The comparisons of one annotator in their order, with the votes so far. Its methods may be called by threads.

    folder: of the votes, where `store_plan` has been called. Raises DiffalignError for a name that is none, for a
    damaged file of votes, and for votes on other pairs.
    """

    def __init__(self, material: Material, folder: Path, annotator: str) -> None:
        self.material, self.annotator = material, annotator
        self.order = order_of(material.plan, annotator)
        self._place = {shown.comparison.id: place for place, shown in enumerate(self.order)}
        self._lock = threading.Lock()
        self._encoded: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self.log = VoteLog(votes_file(folder, annotator))
        for pair in self.log.standing:
            if pair not in self._place:
                self.log.close()
                raise DiffalignError(
                    f"{self.log.file} has a vote on {pair!r:.60}, which is not in the plan; restore it"
                )

    @property
    def judged(self) -> int:
        """Comparisons with a vote, or skipped."""
        return len(self.log.standing)

    @property
    def done(self) -> bool:
        """Whether no comparison is left."""
        return self.judged == len(self.order)

    def state(self) -> dict[str, Any]:
        """What the page shows: the comparison to judge, the one after it, progress."""
        with self._lock:
            return self._state()

    def vote(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Stores {"event", "place", "key", "seconds"}, and returns the new state when the vote is on the disk.

        The same event a second time changes nothing. Raises StaleError where the pair has a vote, RequestError for
        another request, and OSError where the vote cannot be written.
        """
        key, place, seconds = request.get("key"), self._placed(request), request.get("seconds")
        if key not in KEYS or isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise RequestError(f"key {key!r:.40} and seconds {seconds!r:.40} are not a vote")
        left = self.order[place].left
        sides = {"left": ("first", "second")[left], "right": ("second", "first")[left]}
        return self._add(request, place, sides.get(key, key), float(max(-1, min(seconds, MOST_SECONDS))))

    def undo(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Withdraws the last vote, {"event", "place"}; returns and raises as `vote` does, StaleError where the vote
        at this place is not the last."""
        return self._add(request, self._placed(request), UNDO, 0.0)

    def image(self, place: int, side: int) -> bytes:
        """The PNG on the left (0) or right (1) of a place: as training sees it, without the metadata of its file.

        Raises RequestError for a place or side that there is not, and ImageError for an image that cannot be read.
        """
        if not 0 <= place < len(self.order) or side not in (0, 1):
            raise RequestError(f"there is no image at place {place}, side {side}")
        with self._lock:
            if (known := self._encoded.get((place, side))) is not None:
                return known
        shown, stream = self.order[place], io.BytesIO()
        image = self.material.images(shown.comparison.id)[shown.left ^ side].open()
        image.info = {}  # no name of a model or prompt goes to the page
        image.save(stream, "PNG", compress_level=1)
        with self._lock:
            self._encoded[place, side] = stream.getvalue()
            while len(self._encoded) > ENCODED:
                self._encoded.popitem(last=False)
        return stream.getvalue()

    def close(self) -> None:
        """Waits for a vote that is being written; later ones are refused."""
        with self._lock:
            self.log.close()

    def _placed(self, request: Mapping[str, Any]) -> int:
        place = request.get("place")
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(self.order):
            raise RequestError(f"there is no place {place!r:.40}")
        return place

    def _add(self, request: Mapping[str, Any], place: int, vote: str, seconds: float) -> dict[str, Any]:
        shown = self.order[place]
        row: dict[str, Any] = {
            "event": request.get("event"),
            "pair": shown.comparison.id,
            "vote": vote,
            "left": shown.left,
            "seconds": round(seconds, 2),
            "time": now(),
        }
        if fault := event_fault(row):
            raise RequestError(f"not a vote: {fault}")
        with self._lock:
            self.log.add(Event(**row))
            return self._state()

    def _state(self) -> dict[str, Any]:
        left = [place for place, shown in enumerate(self.order) if shown.comparison.id not in self.log.standing]
        last = self.log.last
        recent = [event.seconds for event in list(self.log.standing.values())[-RECENT:]]
        return {
            "annotator": self.annotator,
            "total": len(self.order),
            "judged": self.judged,
            "skipped": sum(event.vote == "skip" for event in self.log.standing.values()),
            "current": self._shown(left[0]) if left else None,
            "next": self._shown(left[1]) if len(left) > 1 else None,
            "last": None if last is None else {"place": self._place[last.pair], "key": _key(last)},
            "seconds_left": round(median(recent) * len(left)) if recent else None,
        }

    def _shown(self, place: int) -> dict[str, Any]:
        return {"place": place, "prompt": self.order[place].comparison.prompt}


def _key(event: Event) -> str:
    """The key that made a vote."""
    if event.vote in ("first", "second"):
        return "left" if ("first", "second")[event.left] == event.vote else "right"
    return event.vote
