"""`diffalign data lists`: ranked lists from pairs that share images."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from diffalign.cli.main import main
from diffalign.data.rewrite.chains import cut_into_chains, without_circles
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from tests.data.helpers import png, write_parquet


def rows(*comparisons: tuple[str, int, int]) -> list[dict[str, object]]:
    """Pairs of a prompt: the better and the worse image."""
    return [{"prompt": p, "chosen": png(one), "rejected": png(other)} for p, one, other in comparisons]


@pytest.mark.parametrize(
    ("edges", "chains"),
    [
        ("ab bc cd", ["abcd"]),
        ("ab", ["ab"]),
        ("ab cb bd", ["abd", "cb"]),
        ("ac ab bc", ["abc", "ac"]),  # the shortcut is a list of its own
        ("ab bc cd de", ["abcd", "de"]),  # of at most four
    ],
)
def test_each_comparison_is_between_neighbours_of_one_chain(edges: str, chains: list[str]) -> None:
    assert ["".join(chain) for chain in cut_into_chains([(a, b) for a, b in edges.split()], longest=4)] == chains


def test_a_random_graph_is_covered_once_and_every_circle_is_left_out() -> None:
    random = Random(0)
    edges = list({(random.randrange(12), random.randrange(12)) for _ in range(40)})
    edges = [(a, b) for a, b in edges if a != b]
    clear = without_circles(edges)
    chains = cut_into_chains(clear)
    assert sorted(edge for chain in chains for edge in pairwise(chain)) == sorted(clear)
    assert all(len(set(chain)) == len(chain) <= 8 for chain in chains)
    lost = set(edges) - set(clear)
    assert {a for a, _ in lost} <= {b for _, b in lost}  # each start of one is the end of another
    assert without_circles([(1, 2), (2, 3), (3, 1), (3, 4)]) == [(3, 4)]


def test_pairs_become_lists_that_the_run_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = rows(("p", 0, 1), ("p", 1, 2), ("p", 0, 1), ("q", 3, 4), ("q", 4, 3), ("q", 5, 3), ("p", 2, 6))
    file, out = write_parquet(tmp_path / "pairs.parquet", stored), tmp_path / "lists.parquet"
    main(["data", "lists", str(file), "--out", str(out)])
    said = capsys.readouterr().out
    assert "lists.parquet: 1 of 2, 1 of 4 images, of 7 pairs" in said
    assert "left out: 1 repeated pairs, 2 preferences that contradict others" in said
    table = open_pairs(out, DataSpec(lists=True))
    assert [(table.prompts[i], [ref.read() for ref in table[i].images]) for i in range(2)] == [
        ("p", [png(0), png(1), png(2), png(6)]),
        ("q", [png(5), png(3)]),
    ]


def test_what_lists_cannot_have_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_parquet(tmp_path / "pairs.parquet", [row | {"weight": 2.0} for row in rows(("p", 0, 1), ("p", 1, 2))])
    for options, message in (
        (["--out", str(tmp_path / "a.parquet")], "write the data without that column"),
        (["--out", str(tmp_path / "a.jsonl")], "name the file a.parquet"),
        (["--out", str(file), "--overwrite"], "is in the way"),
    ):
        with pytest.raises(SystemExit):
            main(["data", "lists", str(file), *options])
        assert message in capsys.readouterr().err
