"""A bar is redrawn on a terminal and is lines elsewhere, few of them; it can be switched off."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from diffalign.io import progress
from diffalign.io.progress import Progress, disable_progress_bars, enable_progress_bars


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def advance(file: io.StringIO, steps: int = 100, **settings: object) -> str:
    with Progress(total=steps, desc="steps", unit=" steps", file=file, **settings) as bar:
        for _ in range(steps):
            bar.update()
            bar.set_postfix(loss="0.69")  # tqdm draws at every such call
    return file.getvalue()


@pytest.fixture
def bars() -> Iterator[None]:
    yield
    enable_progress_bars()


def test_a_file_gets_one_line_at_the_end_of_a_short_bar() -> None:
    (line,) = advance(io.StringIO()).splitlines()
    assert line.startswith("steps: 100/100 [")
    assert line.endswith("loss=0.69]")
    assert len(line) <= 80


def test_a_long_bar_gets_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))  # a second for each look at the clock
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines = advance(io.StringIO()).splitlines()
    assert 3 <= len(lines) <= 100 / progress.LINE_SECONDS + 2
    assert lines[-1].startswith("steps: 100/100 [")


def test_a_terminal_is_redrawn_in_one_line() -> None:
    text = advance(Screen(), mininterval=0.0)
    assert text.count("\r") > 10
    assert text.count("\n") == 1


def test_what_leaves_nothing_and_what_is_not_due_writes_no_line() -> None:
    assert advance(io.StringIO(), leave=False) == ""
    assert advance(io.StringIO(), delay=60.0) == ""


@pytest.mark.usefixtures("bars")
def test_bars_can_be_switched_off() -> None:
    disable_progress_bars()
    assert advance(Screen()) == ""
    enable_progress_bars()
    assert advance(Screen()) != ""
    assert advance(Screen(), disable=True) == ""


def test_the_last_line_comes_once_and_slow_rates_have_no_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffalign.io.progress.LINE_SECONDS", 0.0)  # every update is due
    out = io.StringIO()
    with Progress(total=2, unit=" steps", file=out) as bar:
        bar.display()
        bar.n = 2
        bar.display()
    assert out.getvalue().count("2/2 [") == 1
    assert Progress.format_meter(1, 2, 4.0, unit=" steps").endswith("4.00s/steps]")
