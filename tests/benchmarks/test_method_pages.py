"""docs/papers.md and docs/which_method.md show the records that their figures come from, for every method."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.method_pages import (
    ARENA,
    CHOICE,
    NEEDS,
    PAPERS,
    PUBLISHED,
    RECORD,
    SWEEP,
    choice_table,
    paper_table,
    replaced,
    sweep_table,
)
from diffalign.arena.entries import entries
from diffalign.evaluation.published.catalogue import catalogue

METHODS = {entry.name for entry in entries() if not entry.control}


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def test_the_pages_show_the_records(record: dict[str, Any]) -> None:
    tuned = json.loads(SWEEP.read_text())
    for page, table in (
        (PAPERS, paper_table(record, catalogue())),
        (CHOICE, choice_table(record)),
        (ARENA, sweep_table(tuned)),
    ):
        assert table in page.read_text(), "write it anew: python -m benchmarks.method_pages"


def test_every_method_has_data_that_it_needs() -> None:
    named = [name for names in NEEDS.values() for name in names]
    assert sorted(named) == sorted(METHODS)


def test_published_gains_are_of_methods_that_tables_have() -> None:
    known = catalogue()
    rows = {name for table in known.tables for figures in table.figures.values() for name in figures}
    assert {PUBLISHED[name] for name in METHODS & PUBLISHED.keys()} <= rows
    line = next(x for x in paper_table({"views": [{"rows": []}] * 3}, known).splitlines() if x.startswith("| [`spo`]"))
    assert (
        "SD1.5 +0.66 ([LPO](published.md#lpo)), +0.90 ([SPO](published.md#spo))" in line
    )  # 21.22 − 20.56, 21.43 − 20.53
    assert line.count("not measured") == 2


def test_a_table_is_replaced_whole() -> None:
    page = "before\n\n| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n\nafter\n"
    assert replaced(page, "| a | b |\n|---|---|\n| 5 | 6 |\n") == "before\n\n| a | b |\n|---|---|\n| 5 | 6 |\n\nafter\n"
    twice = page + page
    new = "| a | b |\n|---|---|\n| 7 | 8 |\n"
    assert replaced(twice, new, "after").index(new) > len(page)
    with pytest.raises(ValueError, match="substring not found"):
        replaced("before\n", "| a |\n")
