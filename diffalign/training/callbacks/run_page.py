"""`run.html`, the page of a run beside its `metrics.jsonl`: written anew while the run goes on, and at its end.

The page is made from the run's files alone, in the main process, between two steps. It is written at a log, at most
every `SECONDS` seconds, and less often where writing takes more than `SHARE` of the time. A page that cannot be
written is one warning; the run continues.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffalign.config.schema import AnyConfig, Config
from diffalign.errors import DiffalignError
from diffalign.pages.html import save_page
from diffalign.pages.run_page.data import RunState, read_run
from diffalign.pages.run_page.page import run_page
from diffalign.pages.run_page.summary import summary
from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.metrics import RUN_PAGE
from diffalign.types import Evidence

log = logging.getLogger(__name__)

SECONDS = 10.0  # between two pages, at least
SHARE = 0.01  # of the time, at most


class RunPage(Callback):
    """Keeps `run.html` current."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.state: TrainingState | None = None  # in the main process
        self.due = 0.0
        self.finished = self.failed = False

    def on_train_begin(self, state: TrainingState) -> None:
        """Writes the first page, so that there is one to open."""
        if state.run.accelerator.is_main_process:
            self.state = state
            self._write(RunState("running", step=state.step))

    def on_log(self, state: TrainingState) -> None:
        """Writes a page where one is due."""
        if self.state is not None and self.clock() >= self.due:
            self._write(RunState("running", step=state.step))

    def on_train_end(self, state: TrainingState) -> None:
        """Writes the last page."""
        self.finished = True
        if self.state is not None:
            best = state.weights_of
            why = "" if best is None else f"The final weights are those of step {best}, the best held-out measurement."
            self._write(RunState("finished", why, state.step))

    def close(self) -> None:
        """The page says so where the run ended before its end."""
        if self.state is not None and not self.finished:
            error = sys.exc_info()[1]  # the loop closes its callbacks while the error passes
            why = "" if error is None else f"{type(error).__name__}: {error}"[:500]
            self._write(RunState("ended", why, self.state.step))
        self.state = None  # it refers to the run and the callbacks: the cycle would keep the network

    def _write(self, state: RunState) -> None:
        assert self.state is not None
        begun = self.clock()
        try:
            write_run_page(self.state.run.output_dir, self.state.run.config, state)
        except Exception as error:  # whatever it is: a page never ends a run
            if not self.failed:
                log.warning("no %s, training continues: %s: %s", RUN_PAGE, type(error).__name__, error)
            self.failed = True
        now = self.clock()
        self.due = now + max(SECONDS, (now - begun) / SHARE)


def write_run_page(folder: Path, config: AnyConfig, state: RunState) -> None:
    """Writes the page of one run to its folder, whole or not at all."""
    run = read_run(folder, config.resolved(), state, start_loss=start_loss(config))
    page = run_page([run], now=time.time())
    save_page(folder / RUN_PAGE, page)


def print_summary(config: AnyConfig) -> None:
    """Prints what the finished run of a config did and where its page is; nothing in other processes than the first."""
    if os.environ.get("RANK", "0") == "0":
        folder = Path(config.output_dir)
        print(summary(read_run(folder, config.resolved(), RunState("finished")), folder / RUN_PAGE))


def start_loss(config: AnyConfig) -> float | None:
    """The objective's loss of a pair while policy and reference are equal; None where that is no single number."""
    objective: Any = config.objective if isinstance(config, Config) else None
    if objective is None or not objective.needs_reference or objective.compares == "lists":  # log m! of each length
        return None
    losses = []
    try:
        for error in (0.5, 0.25):
            equal = torch.full((2, 1), error)
            t = torch.zeros(1, dtype=torch.int64)
            start = Evidence(equal, equal, t, distance=torch.zeros(2, 1), alignment=equal)
            losses.append(float(objective.score(start).loss))
        return losses[0] if losses[0] == losses[1] else None
    except (DiffalignError, RuntimeError, IndexError, AttributeError):  # its loss depends on more than the errors
        return None
