"""About 2,200 bad inputs: none ends in a traceback, in NaN or in silence. `python -m tests.fuzz` tries more."""

from __future__ import annotations

from typing import Any

import pytest

from diffalign.data.table import users
from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError
from tests.fuzz import kinds
from tests.fuzz.harness import Report, not_finite, run
from tests.fuzz.suite import KINDS

LEAST = 1500  # cases of all kinds together


def test_there_are_enough_of_every_kind() -> None:
    assert sum(count for _, count in KINDS.values()) >= LEAST
    assert all(count >= 20 for _, count in KINDS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_bad_inputs_end_well(kind: str, record_property: Any, capsys: pytest.CaptureFixture[str]) -> None:
    report = run({kind: KINDS[kind]})
    record_property("endings", dict(report.endings[kind]))
    with capsys.disabled():
        print("\n" + report.text().splitlines()[1], end=" ")
    assert not report.faults, report.text()
    assert report.cases == KINDS[kind][1]
    assert set(report.endings[kind]) == {"right", "refused"}  # inputs are neither all spoilt nor all whole


def _planted(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, fault: Any, kind: str) -> Report:
    monkeypatch.setattr(target, name, fault)
    return run({kind: (KINDS[kind][0], 40)})


def test_a_reader_that_raises_another_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **settings: Any) -> Any:
        raise KeyError("prompt")

    report = _planted(monkeypatch, kinds, "read_image_manifest", broken, "manifest")
    assert any("KeyError" in fault.what for fault in report.faults)
    assert "--again manifest 0" in report.text()


def test_a_reader_that_gives_nan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = users.embedding
    report = _planted(monkeypatch, users, "embedding", lambda *of: whole(*of) * float("nan"), "users")
    assert any("success with" in fault.what for fault in report.faults)


def test_a_check_that_lets_nan_through_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = NoiseSchedule.from_config.__func__  # type: ignore[attr-defined]

    def lax(cls: Any, config: Any) -> Any:
        try:
            return whole(cls, config)
        except DiffalignError:
            made = whole(cls, kinds.SCHEDULE)
            object.__setattr__(made, "alphas_cumprod", made.alphas_cumprod * float("nan"))
            return made

    report = _planted(monkeypatch, NoiseSchedule, "from_config", classmethod(lax), "schedule")
    assert any("success with" in fault.what for fault in report.faults)


def test_an_error_without_words_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(path: Any, words: Any = ()) -> Any:
        raise DiffalignError(" ")

    report = _planted(monkeypatch, kinds, "load_config", silent, "config")
    assert all("without a message" in fault.what for fault in report.faults)
    assert len(report.faults) == 40


def test_numbers_are_looked_at_everywhere() -> None:
    assert not_finite({"a": [1, 2.0, "nan", None, {"b": (0.5,)}]}) is None
    assert not_finite({"a": [1, {"b": (float("inf"),)}]}) == "a: b: inf"
