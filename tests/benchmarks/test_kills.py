"""A kill and what is compared after it; a campaign's own faults are found; the committed campaign and soak."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.data_scale import LAYOUTS, measured, prompt
from benchmarks.faults import ERRORS, FAULTS, attempt
from benchmarks.forked import Death
from benchmarks.kill_kinds import KINDS
from benchmarks.kills import Campaign, differences, state_of, table
from benchmarks.models import pairs_file
from benchmarks.soak import STEPS_PER_ROUND, rows_of, sample, slope, soak
from diffalign.data.table.open import open_pairs

AT_ONCE: Any = SimpleNamespace(randint=lambda *_: 2)  # a fault from the second operation on
RESULTS = Path(__file__).parents[2] / "benchmarks/results"


@pytest.fixture
def scoring(tmp_path: Path) -> Campaign:
    """`data score` of twelve pairs."""
    pairs_file(tmp_path / "inputs/pairs.parquet", 12, 32)
    return Campaign("data score", KINDS["data score"], tmp_path, tmp_path / "inputs")


def test_a_command_that_is_killed_while_it_writes_ends_as_its_twin(scoring: Campaign) -> None:
    state, whole = scoring.twin()
    assert list(state) == ["scores.jsonl"]
    scoring.start()
    torn = scoring.run(Death(operation=whole.operations - 2, torn=True))
    assert torn.code == -9
    assert differences(state_of(scoring.place), state)
    assert scoring.run(again=True).code == 0
    assert state_of(scoring.place) == state


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_disk_ends_in_one_message_and_is_gone_with_its_cause(fault: str, scoring: Campaign) -> None:
    found = attempt(scoring, fault, scoring.twin(), AT_ONCE)
    assert found["wrong"] == []
    assert found["code"] == (2 if fault in ERRORS else 0)
    if fault in ERRORS:
        assert "scores.jsonl" in found["said"][0]


def test_a_traceback_and_a_wrong_end_are_found(scoring: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = scoring.twin()
    monkeypatch.setattr("diffalign.data.table.scores.save_text", lambda *_: 1 / 0)
    wrong = attempt(scoring, "full disk", twin, AT_ONCE)["wrong"]
    assert "ZeroDivisionError" in wrong[0]
    assert "scores.jsonl is missing" in wrong


def test_differences_are_found(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / name).mkdir()
        torch.save({"step": [1, torch.tensor(value)]}, tmp_path / name / "training_state.pt")
        (tmp_path / name / "timing.jsonl").write_text(json.dumps({"step": 1, "seconds": random.random()}) + "\n")
    a, b, c = (state_of(tmp_path / name) for name in "abc")
    assert differences(b, a) == []
    assert differences(c, a) == ["training_state.pt differs"]
    assert differences({}, {"x": ""}) == ["x is missing"]
    assert differences({"x": ""}, {}) == ["x is not the twin's"]


def test_slopes_and_samples(tmp_path: Path) -> None:
    assert slope([0, 1, 2, 3], [1, 3, 5, 7]) == (2.0, 0.0)
    before = sample(0, tmp_path, tmp_path)
    with (tmp_path / "x").open("w") as opened:
        opened.write("four")
        opened.flush()
        after = sample(1, tmp_path, tmp_path)
    assert after.files == before.files + 1
    assert (after.cache, after.output) == (4e-6, 4e-6)


def test_a_short_soak(tmp_path: Path) -> None:
    found = soak("steps", 3, tmp_path / "soak")
    assert [one["step"] for one in found["samples"]] == [1, 2, 3]
    assert {one["files"] for one in found["samples"][1:]} == {found["samples"][1]["files"]}
    assert found["samples"][-1]["cache"] > 1  # the latents of 1,008 pairs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_of_every_layout_are_read_as_they_were_written(layout: str, tmp_path: Path) -> None:
    path = LAYOUTS[layout](tmp_path, 7)
    assert measured(path, check=False).keys() == {"start", "identity", "ms/pair", "memory"}
    assert [row.prompt for row in open_pairs(path)] == [prompt(i) for i in range(7)]


def test_the_committed_campaign_has_no_difference() -> None:
    rows = json.loads((RESULTS / "kills.json").read_text())["kinds"]
    assert len(rows) >= 14
    assert sum(row["kills"] for row in rows) >= 300
    assert all(row["equal"] == row["attempts"] and not row["faults"] for row in rows)
    assert {row["kind"] for row in rows} <= KINDS.keys()
    assert any("FSDP2" in row["kind"] and row["processes"] == 2 for row in rows)
    assert table(rows) in (RESULTS / "kills.md").read_text()


def test_the_committed_soak_does_not_grow() -> None:
    found = json.loads((RESULTS / "soak.json").read_text())
    assert (found["steps"]["steps"], found["rounds"]["steps"]) == (3000, 30 * STEPS_PER_ROUND)
    text = (RESULTS / "soak.md").read_text()
    for row in rows_of({name: found[name] for name in ("steps", "rounds")}):
        assert " | ".join(row) in text
    for name in ("steps", "rounds"):
        assert abs(found[name]["per_1000_steps"]["files"]["slope"]) < 1e-9
        assert found[name]["per_1000_steps"]["rss"]["slope"] < 1.0  # MB
