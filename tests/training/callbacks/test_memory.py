"""Memory of a run that nothing uses: found while it goes on, in a search that leaves out what was there before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from diffalign.training.callbacks import memory
from diffalign.training.callbacks.memory import SECONDS, FreeMemory

STATE: Any = SimpleNamespace()


class Ring:
    """Refers to itself, as what a checkpoint leaves."""

    def __init__(self) -> None:
        self.self = self


@pytest.fixture(autouse=True)
def nothing_is_frozen() -> Iterator[None]:
    """As in a program of its own: `conftest.py` freezes what stays for the session."""
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.freeze()


@pytest.fixture
def no_search() -> Iterator[None]:
    """Python's own search would find the rings as well."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_search")
def test_rings_are_freed_after_a_log_and_at_most_every_few_seconds() -> None:
    now = [0.0]
    callback = FreeMemory(lambda: now[0])
    callback.on_train_begin(STATE)

    def step(at: float, log: bool) -> bool:
        """Whether a ring is gone after a step."""
        now[0] = at
        ring = weakref.ref(Ring())
        if log:
            callback.on_log(STATE)
        callback.on_step_end(STATE)
        return ring() is None

    assert not step(SECONDS / 2, log=True)
    assert not step(SECONDS + 1, log=False)
    assert gc.get_freeze_count() == 0
    assert step(SECONDS + 2, log=True)
    assert gc.get_freeze_count() > 0
    assert not step(SECONDS + 3, log=True)
    assert step(3 * SECONDS, log=True)
    callback.close()
    assert gc.get_freeze_count() == 0


def test_a_program_s_own_frozen_objects_stay_so() -> None:
    callback = FreeMemory(lambda: SECONDS)
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        callback.on_log(STATE)
        callback.on_step_end(STATE)
        callback.close()
        assert frozen - 1000 < gc.get_freeze_count() <= frozen  # a few of a million may die meanwhile
    finally:
        gc.unfreeze()


def test_a_system_without_malloc_trim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_libc", lambda: None)
    memory.free_memory()
