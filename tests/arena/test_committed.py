"""The committed results of the arena: docs/arena.md shows them, and both tables separate good from broken methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.arena.arena import tables
from diffalign.arena.entries import FULL, PREFERENCES, QUICK, entries

ROOT = Path(__file__).parents[2]
QUICK_RESULT, FULL_RESULT = ROOT / "assets/arena/result.json", ROOT / "benchmarks/results/arena.json"
# entries that are newer than the committed quick results, as docs/arena.md says
SINCE_QUICK = {"poly_dpo", "linear_dpo", "dmpo", "dspo", "diffusion_nft", "advantage", "listwise_dpo", "lpo"}
RESULTS = {"quick": (QUICK_RESULT, QUICK, SINCE_QUICK), "full": (FULL_RESULT, FULL, set[str]())}


@pytest.fixture(params=RESULTS)
def found(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Any, set[str]]:
    file, protocol, since = RESULTS[request.param]
    return json.loads(file.read_text()), protocol, since


def test_the_readme_shows_the_quick_arena() -> None:
    table = (ROOT / "assets/arena/leaderboard.md").read_text()
    assert table == tables(json.loads(QUICK_RESULT.read_text()))
    assert table.partition("\n\n")[2].strip() in (ROOT / "docs/arena.md").read_text()


def test_the_docs_show_the_full_one() -> None:
    page = (ROOT / "docs/arena.md").read_text()
    for view in tables(json.loads(FULL_RESULT.read_text())).split("\n\n")[1::2]:
        assert view.strip() in page


def test_they_are_of_the_protocol_and_say_where_they_come_from(found: tuple[dict[str, Any], Any, set[str]]) -> None:
    result, protocol, _ = found
    assert result["protocol"]["steps"] == protocol.steps
    assert tuple(result["protocol"]["seeds"]) == protocol.seeds
    assert len(result["protocol"]["prompts"]) * result["protocol"]["pictures_per_prompt"] >= 256
    assert result["command"].startswith("diffalign arena")
    assert result["environment"]["git_commit"]
    assert result["environment"]["versions"]["torch"]
    assert "/home" not in json.dumps(result)


def test_every_entry_is_there(found: tuple[dict[str, Any], Any, set[str]]) -> None:
    for view in found[0]["views"]:
        others = {entry.name for entry in entries() if entry.own_judge and view["preference"] != PREFERENCES[0]}
        assert {row["name"] for row in view["rows"]} == {entry.name for entry in entries()} - found[2] - others
        assert all(row["failed"] is None for row in view["rows"])


def test_the_turned_sign_is_at_the_bottom(found: tuple[dict[str, Any], Any, set[str]]) -> None:
    """In the view that everything else is chosen for: equal steps, the preference of the sweep."""
    first = found[0]["views"][0]
    assert first["preference"] == PREFERENCES[0]
    last = first["rows"][-1]
    assert last["name"] == "flipped"
    assert last["rewards"]["world"]["win_rate"][2] < 0.5
    assert last["rewards"]["world"]["gain"][2] < 0


def test_random_labels_gain_nothing_to_speak_of() -> None:
    """Over three training seeds. They may lose: at the rate of the sweep it does harm (docs/arena.md)."""
    first = json.loads(FULL_RESULT.read_text())["views"][0]
    (row,) = (row for row in first["rows"] if row["name"] == "shuffled")
    mean, low, high = row["rewards"]["world"]["gain"]
    assert mean <= 0.03
    assert low < 0 < high
    dpo = next(row for row in first["rows"] if row["name"] == "dpo")["rewards"]["world"]["gain"]
    assert high < dpo[1]  # and the method that it is the control of gains more than all of its interval
