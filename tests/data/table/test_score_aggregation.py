"""Several scorers combined to one verdict, by hand; excluded rows are named in order."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from diffalign.cli.main import main
from diffalign.data.row import DISAGREEMENT, DataError
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.report import check_pairs
from diffalign.data.table.score_aggregation import Axis, use_axes
from diffalign.data.table.scores import read_scores, use_scores
from tests.data.helpers import pick_rows, write_jsonl, write_parquet

# gaps first − second:  look +3 −1 +1 0 ·   text −.1 −.2 +.3 +.2 +1  (· = unreadable)
LOOK = [(5.0, 2.0), (1.0, 2.0), (4.0, 3.0), (2.0, 2.0), (None, 1.0)]
TEXT = [(0.1, 0.2), (0.3, 0.5), (0.6, 0.3), (0.4, 0.2), (2.0, 1.0)]


@pytest.fixture
def table(tmp_path: Path) -> PairTable:
    return open_pairs(write_parquet(tmp_path / "pairs.parquet", pick_rows(5)))


def files(table: PairTable, folder: Path, text_weight: float = 1.0) -> list[Axis]:
    axes = []
    for name, scores, weight in (("look", LOOK, 1.0), ("text", TEXT, text_weight)):
        lines = [{"scorer": name}]
        lines += [{"id": i, "score_0": a, "score_1": b} for i, (a, b) in zip(table.ids, scores, strict=False)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        axes.append(Axis(name, str(folder / f"{name}.jsonl"), weight))
    return axes


def stored_scores(table: PairTable) -> list[tuple[float, float]]:
    """In stored order, whichever side is the chosen one."""
    both = [table.scores(index) for index in range(len(table))]
    return [pair[::-1] if table.index.first[i] else pair for i, pair in enumerate(both)]  # type: ignore[index]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sum", [(6.0, 4.0), (4.0, 7.0), (10.0, 6.0), (6.0, 4.0)]),  # text counts ten times
        ("min", [(1.0, 2.0), (1.0, 2.0), (4.0, 3.0), (2.0, 2.0)]),  # |gaps| 3 1, 1 2, 1 3, 0 2: the smaller decides
    ],
)
def test_scores_by_hand(table: PairTable, tmp_path: Path, how, expected) -> None:
    labels = list(table.index.first)
    use_axes(table, files(table, tmp_path, 10.0), how, relabel=False)
    for found, wanted in zip(stored_scores(table), expected, strict=False):
        assert found == pytest.approx(wanted)
    assert all(math.isnan(x) for x in stored_scores(table)[4])  # one axis has no score
    assert list(table.index.first) == labels


@pytest.mark.parametrize(("how", "first"), [("sum", [0, 1, 0, 0]), ("min", [1, 1, 0, None])])
def test_relabelled_by_the_verdict_and_a_tie_leaves_the_label(table: PairTable, tmp_path: Path, how, first) -> None:
    """Unweighted sums: gaps 2.9 −1.2 1.3 .2; min: the axes text, text, text, and look, which is a tie."""
    labels = list(table.index.first)
    use_axes(table, files(table, tmp_path), how, relabel=True)
    expected = [label if wanted is None else wanted for wanted, label in zip([*first, None], labels, strict=True)]
    assert list(table.index.first) == expected


def test_pairs_on_which_axes_disagree_are_left_out_and_named(table: PairTable, tmp_path: Path) -> None:
    ids = list(table.ids)
    use_axes(table, files(table, tmp_path), "all_agree", relabel=True)
    assert table.ids == ids[1:]  # look +3 against text −.1; the tie of pair 3 agrees, as does what has no score
    (problem,) = [p for p in table.problems if p.kind == DISAGREEMENT]
    assert problem.dropped
    assert problem.reason == "look by 3 for the first image; text by 0.1 for the second"
    assert "pairs.parquet" in problem.where
    assert stored_scores(table)[0] == pytest.approx((1.3, 2.5))  # the sums


def test_the_rest_is_the_table_of_the_rest(tmp_path: Path) -> None:
    """Everything that the table knows moves along: ids, sides, sizes, files on disk, and with them the identity."""
    listing = write_jsonl(tmp_path / "pairs.jsonl", 6)
    table = open_pairs(listing, DataSpec(invert_preference=True))
    _ = table.identity
    table.leave_out("axes disagree", {1: "so", 4: "and so"})
    rest = [line for i, line in enumerate(listing.read_text().splitlines()) if i not in (1, 4)]
    (tmp_path / "rest.jsonl").write_text("\n".join(rest) + "\n")
    other = open_pairs(tmp_path / "rest.jsonl", DataSpec(invert_preference=True))
    assert (table.ids, table.prompts, table.sizes) == (other.ids, other.prompts, other.sizes)
    assert [table[i].chosen.path for i in range(4)] == [other[i].chosen.path for i in range(4)]
    assert table.identity == other.identity
    assert [p.where for p in table.problems] == ["pairs.jsonl line 2", "pairs.jsonl line 5"]


def test_one_file_is_what_one_file_was(table: PairTable, tmp_path: Path) -> None:
    one, other = files(table, tmp_path)[0], open_pairs(tmp_path / "pairs.parquet")
    use_axes(table, [one], "sum", relabel=True)
    use_scores(other, read_scores(one.file), relabel=True, where="scores")
    assert stored_scores(table)[:4] == stored_scores(other)[:4]
    assert list(table.index.first) == list(other.index.first)
    assert table.identity == other.identity


def test_faults(table: PairTable, tmp_path: Path) -> None:
    axes = files(table, tmp_path)
    text = tmp_path / "text.jsonl"
    lines = text.read_text().splitlines(keepends=True)
    text.write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match=r"data.scores: .*text.jsonl has no scores for 1 of 5 pairs"):
        use_axes(table, axes, "sum", relabel=False)
    with pytest.raises(DataError, match="there is no file of scores"):
        use_axes(table, [*axes, Axis("x", str(tmp_path / "x.jsonl"))], "sum", relabel=False)
    with pytest.raises(DataError, match="aggregate = 'mean'; allowed are sum, min, all_agree"):
        use_axes(table, axes[:1], "mean", relabel=False)
    rows = [{"id": i, "score_0": 0.0, "score_1": 1.0} for i in table.ids]
    for name, flipped in (("look", False), ("text", True)):
        body = [{**row, **({"score_0": 2.0} if flipped else {})} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [{"scorer": name}, *body]))
    with pytest.raises(DataError, match=r"none of the 5 rows is usable.*axes disagree"):
        use_axes(table, axes, "all_agree", relabel=False)


def test_data_check_counts_them(table: PairTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = files(table, tmp_path)
    report = check_pairs(tmp_path / "pairs.parquet", axes=axes, aggregate="all_agree")
    assert report.usable == 4
    command = ["data", "check", str(tmp_path / "pairs.parquet"), "--scores", *(axis.file for axis in axes)]
    main([*command, "--aggregate", "all_agree"])
    out = capsys.readouterr().out
    assert "usable pairs  4" in out
    assert "1 x axes disagree" in out
    main(command)
    assert "usable pairs  5" in capsys.readouterr().out
