"""Memory of the process that nothing uses is given back while a run goes on, so that a long run does not grow.

Two kinds remain otherwise. Checkpoints leave objects that refer to one another; Python looks for those once they are a
quarter of all objects, and libraries alone have half a million. And the C library keeps the memory of large values,
such as those of validation images, in pieces between small ones. So the objects that are there after the first seconds
are left out of Python's search, which is then short, and free memory goes back to the system (`malloc_trim`; glibc has
it, other C libraries do not).
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable

from diffalign.training.callbacks.base import Callback, TrainingState

SECONDS = 10.0  # between two times, at least


class FreeMemory(Callback):
    """Frees after logs, once the step's other callbacks are done: the last one of a run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.due, self.logged, self.froze = 0.0, False, False

    def on_train_begin(self, state: TrainingState) -> None:
        """A run that ends soon needs none of this."""
        self.due = self.clock() + SECONDS

    def on_log(self, state: TrainingState) -> None:
        """The step's checkpoint is still to come."""
        self.logged = True

    def on_step_end(self, state: TrainingState) -> None:
        """Frees where it is due. The first time, all objects are searched, and those that remain are then left out."""
        if self.logged and self.clock() >= self.due:
            free_memory()
            if not gc.get_freeze_count():  # the program may have done so itself
                gc.freeze()
                self.froze = True
            self.due = self.clock() + SECONDS
        self.logged = False

    def close(self) -> None:
        """Takes the objects in again: the run's own are to be freed as any others."""
        if self.froze:
            gc.unfreeze()
            self.froze = False


def free_memory() -> None:
    """Frees objects that only refer to one another, and gives free memory back to the system where it can be asked."""
    gc.collect()
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _libc() -> object:
    """The functions of this process's libraries; None on a system that has no such list."""
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
