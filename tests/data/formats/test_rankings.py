"""Which pairs of a ranking are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.config.sections import DataSection
from diffalign.data.row import DataError
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from tests.data.helpers import pick_rows, png, write_parquet


@pytest.fixture
def rankings(tmp_path: Path) -> Path:
    """Four ranked images, two images of which the second is preferred, and an entry with a fault."""
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    entries = [
        {"prompt": "four", "image_path": [f"{i}.png" for i in range(4)], "rank": [3, 1, 4, 2]},
        {"prompt": "two", "image_path": ["4.png", "5.png"], "rank": [2, 1]},
        {"prompt": "none", "image_path": ["4.png"], "rank": [1]},
    ]
    (tmp_path / "test.json").write_text(json.dumps(entries))
    return tmp_path / "test.json"


def names(table: PairTable) -> list[str]:
    rows = [table[i] for i in range(len(table))]
    return [">".join(Path(str(ref.path)).stem for ref in (row.chosen, row.rejected)) for row in rows]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("all", ["1>0", "0>2", "3>0", "1>2", "1>3", "3>2", "5>4"]),
        ("best_worst", ["1>2", "5>4"]),  # ranks 1 and 4
        ("adjacent", ["0>2", "3>0", "1>3", "5>4"]),  # 1, 3, 0, 2 is the order from best to worst
    ],
)
def test_the_pairs_of_a_choice(rankings: Path, choice: str, expected: list[str]) -> None:
    section = DataSection(path=str(rankings), pairs_of_ranking=choice)  # type: ignore[arg-type]
    table = open_pairs(section.path, section.spec)
    assert names(table) == expected
    assert [each.where for each in table.problems] == ["test.json entry 2"]  # said whatever is chosen


def test_of_equal_preferences_the_first_and_the_last_are_a_pair(rankings: Path) -> None:
    entry = {"prompt": "p", "image_path": ["0.png", "1.png", "2.png"], "human_preference": [0, 1, 0]}
    rankings.write_text(json.dumps([entry]))
    assert names(open_pairs(rankings, DataSpec(pairs_of_ranking="best_worst"))) == ["1>2"]


def test_pairs_are_no_rankings(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "pairs.parquet", pick_rows(2))
    with pytest.raises(DataError, match=r"has pairs and no rankings, which are HPDv2's json"):
        open_pairs(file, DataSpec(pairs_of_ranking="adjacent"))
    with pytest.raises(DataError, match="allowed are all, best_worst, adjacent"):
        DataSpec(pairs_of_ranking="some")  # type: ignore[arg-type]
