"""The processes of a run watch each other: a dead one ends the others with its name, one that lags is named.

Each process tells the others where it is, every few seconds, from a thread and through the store of its group (a
TCPStore); its training does nothing for that and exchanges nothing more. So it is known of each process whether

    it failed        its error is in the store, and the others end with it
    it is gone       its pid on this machine, or its silence from another one: the others end and name it
    it lags          others have waited for it for a minute: a warning, with the line at which it is
    it hangs         it has stood at the same line for `PATIENCE` while others wait: all end. `LONG_PATIENCE` within
                     `long_work`, such as a checkpoint, which one process does alone

Numbers of beats are counted, not seconds: processes that were stopped and continued together count on.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from dataclasses import asdict, replace
from datetime import timedelta
from types import TracebackType
from typing import Any

from diffalign.errors import DiffalignError, explain
from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.distributed.vital_signs import Frames, Signs, is_gone, own_signs

log = logging.getLogger(__name__)

BEAT = 3.0  # seconds
SILENT = 15  # beats without a new one from another machine: 45 s
LAGS = 20  # beats that others wait: a minute
PATIENCE = 200  # beats at one line while others wait: 10 minutes
LONG_PATIENCE = 2400  # within long work: 2 hours
GRACE = 10.0  # seconds for the main thread to end by itself, once another process has failed
_GROUP_ERRORS = ("gloo", "nccl", "Connection closed by peer", "Connection reset by peer")
_FIRST = "diffalign/first_failure"


class LostProcessError(DiffalignError):
    """Another process of the run ended or hangs; the message names it, with its error where it gave one."""


class Watch(Callback):
    """Watches within its block; does nothing where there is one process. As a callback it knows the step."""

    def __init__(self, processes: Any) -> None:
        """processes: accelerate's state or accelerator."""
        self.rank, self.size = int(processes.process_index), int(processes.num_processes)
        self.alone = self.size == 1 or "MASTER_ADDR" not in os.environ  # MPI's groups have no store
        self.signs, self.step = own_signs(self.rank), 0
        self.others: dict[int, Signs] = {}
        self.silent: dict[int, int] = {}
        self.unanswered = 0  # beats in a row in which the store did not answer
        self.verdict: str | None = None
        self.warned: set[tuple[int, int]] = set()
        self.frames = Frames(threading.get_ident())
        self.over, self.judged = threading.Event(), threading.Event()

    def on_step_end(self, state: TrainingState) -> None:
        """Notes the step."""
        self.step = state.step

    def __enter__(self) -> Watch:
        if not self.alone:
            from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch's own docs import it so

            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.store: Any = TCPStore(address, port, is_master=False, wait_for_workers=False)
            if self.rank == 0:
                self.store.set(_FIRST, "")
            self._tell()
            self.store.wait([_FIRST, *map(_key, range(self.size))])
            self.store.set_timeout(timedelta(seconds=max(BEAT, 1)))
            self.thread = threading.Thread(target=self._beat, name="diffalign-watch", daemon=True)
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises LostProcessError where an error of the group has another process as its cause."""
        if self.alone:
            return
        if error is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's, because another process has ended
        if error is not None and self._of_the_group(error):
            self.judged.wait((SILENT + 2) * BEAT)
        self.over.set()
        self.thread.join(2 * BEAT)
        if error is None:
            self._last(ended=True)
        elif self.verdict is not None and self._of_the_group(error):
            raise LostProcessError(self.verdict) from error
        else:
            self._fail(error)

    def _of_the_group(self, error: BaseException) -> bool:
        from torch.distributed import DistError

        text = str(error)
        return isinstance(error, DistError | RuntimeError) and any(part in text for part in _GROUP_ERRORS)

    def _fail(self, error: BaseException) -> None:
        """Tells the others, and the launcher, whose report names this process."""
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        text = explain(error) or f"{type(error).__name__}: {error}"
        self._first(f"{self.signs.name} ended: {text[:2000]}")
        self._last(ended=False)
        if isinstance(error, Exception) and os.environ.get("TORCHELASTIC_ERROR_FILE"):
            get_error_handler().record_exception(error)
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            threading.Event().wait(2 * BEAT)  # the store ends with this process: the others read it first

    def _last(self, ended: bool) -> None:
        self.signs = replace(self.signs, ended=ended)
        try:
            self._tell()
        except RuntimeError:  # the store has ended before
            log.debug("the store of the group is closed")

    def _first(self, text: str) -> str:
        """The first failure of the run: this one, unless there was one before."""
        try:
            return self.store.compare_set(_FIRST, "", text).decode()
        except RuntimeError:
            return text  # the store has ended before

    def _tell(self) -> None:
        self.store.set(_key(self.rank), json.dumps(asdict(self.signs)))

    def _beat(self) -> None:
        while not self.over.wait(BEAT):
            try:
                failure = self._exchange()
                self.unanswered = 0
            except RuntimeError:  # torch's errors of networks and stores
                failure, self.unanswered = None, self.unanswered + 1
            failure = failure or self._found()
            if failure is not None:
                self._end(self._first(failure))
                return
            self._warn()

    def _exchange(self) -> str | None:
        """Tells the others where this process is and hears of them; the first failure if there is one."""
        seen = self.frames.look()
        self.signs = replace(self.signs, beat=self.signs.beat + 1, step=self.step, **seen)  # type: ignore[arg-type]
        self._tell()
        ranks = [rank for rank in range(self.size) if rank != self.rank]
        first, *records = self.store.multi_get([_FIRST, *map(_key, ranks)])
        for rank, record in zip(ranks, records, strict=True):
            signs = Signs(**json.loads(record))
            before = self.others.get(rank)
            self.silent[rank] = self.silent.get(rank, 0) + 1 if before and before.beat == signs.beat else 0
            self.others[rank] = signs
        return first.decode() or None

    def _found(self) -> str | None:
        """What is wrong with another process, or with all."""
        others = [signs for signs in self.others.values() if not signs.ended]
        for signs in others:
            gone = is_gone(signs, self.signs.home)
            if gone or (gone is None and self.silent[signs.rank] >= SILENT):
                return f"{signs.name} ended without a word (killed, or its machine is gone); it was at {signs.doing}"
        if self.unanswered >= SILENT:
            where = os.environ["MASTER_ADDR"]
            return f"the store of the group at {where} does not answer: its machine or launcher is gone"
        if not self.signs.waits or self.signs.still < PATIENCE:
            return None
        minutes = round(self.signs.still * BEAT / 60)
        for signs in others:
            if not self._waits(signs) and self._still(signs) >= (LONG_PATIENCE if signs.work else PATIENCE):
                return f"{signs.name} has stood still for {minutes} minutes while others wait for it, at {signs.doing}"
        if all(self._waits(signs) and self._still(signs) >= PATIENCE for signs in others):
            places = "; ".join(f"{signs.name} at {signs.doing}" for signs in [self.signs, *others])
            return f"all processes have waited for each other for {minutes} minutes: {places}"
        return None

    def _still(self, signs: Signs) -> int:
        """Beats since a process moved, or at least said so: a stopped one is silent."""
        return signs.still + self.silent[signs.rank]

    def _waits(self, signs: Signs) -> bool:
        return signs.waits and self.silent[signs.rank] < LAGS

    def _warn(self) -> None:
        """Names those that lag, once a step; the first process that waits for them does it."""
        if not self.signs.waits or self.signs.still < LAGS:
            return
        if any(self._waits(signs) and signs.rank < self.rank for signs in self.others.values()):
            return
        for signs in self.others.values():
            if self._waits(signs) or signs.work or signs.ended or (signs.rank, signs.step) in self.warned:
                continue
            self.warned.add((signs.rank, signs.step))
            waited = round(self.signs.still * BEAT)
            log.warning("%s lags: others have waited %d s for it; it is at %s", signs.name, waited, signs.doing)

    def _end(self, verdict: str) -> None:
        """Ends this process, unless its main thread does that itself: it may be in a call that never returns."""
        self.verdict = verdict
        self.judged.set()
        if self.over.wait(GRACE):
            return
        text = f"diffalign: {verdict}. This process ({self.signs.name}) ends with it\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
        os._exit(1)


def _key(rank: int) -> str:
    return f"diffalign/signs/{rank}"
