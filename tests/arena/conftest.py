from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from diffalign.arena import jobs


class _Inline:
    """An executor whose jobs are done at once, in this process: a new one reads torch and diffusers for seconds."""

    def __init__(self, workers: int, **settings: Any) -> None:
        assert workers >= 1

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*arguments))
        return future

    def shutdown(self, **settings: Any) -> None:
        pass


@pytest.fixture(scope="module")
def inline() -> Iterator[None]:
    """Runs of an arena in this process, with few sampling steps; `test_jobs.py` has processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "ProcessPoolExecutor", _Inline)
        patch.setattr(jobs, "STEPS", 4)
        yield
