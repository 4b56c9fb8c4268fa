"""The end of writing a checkpoint, beside the next steps: flush, hashes, manifest, renaming, removal of old ones.

The files themselves are written within the step, into the system's memory. Until it is renamed, a checkpoint is a
hidden folder, as that of a killed run. One is finished before the next is begun, before the final weights are written,
and before a run returns to an earlier one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from diffalign.errors import explain

log = logging.getLogger(__name__)


class Background:
    """Does one piece of work at a time in a thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Waits for the last piece, and starts this one."""
        self.wait()
        self._last = self._thread.submit(work)

    def wait(self) -> None:
        """Returns when there is no work left. Raises what the last piece raised, once."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def end(self) -> None:
        """Returns when there is no work left. What the last piece raised is logged: the run has an error already."""
        try:
            self.wait()
        except Exception as error:
            log.error("the last checkpoint was not completed: %s", explain(error) or f"{type(error).__name__}: {error}")


def at_once(work: Callable[[], None]) -> None:
    """Does it now."""
    work()
