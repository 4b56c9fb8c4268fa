"""`diffalign data relabel`: decisions are applied to the right pairs and to nothing else, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.cli.main import main
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from tests.cli.test_main import fails

ROWS = 4
HEAD = "id,decision,prompt,chosen_image"


def write_source(folder: Path, **more: Any) -> Path:
    """A listing in which image 1 of every pair is the lighter one, and image 0 is labelled the better one of row 0."""
    rows = []
    for i in range(ROWS):
        for side in range(2):
            Image.new("RGB", (8, 8), (10 * i + 100 * side,) * 3).save(folder / f"{i}-{side}.png")
        row = {"prompt": f"p{i}, a", "image_0": f"{i}-0.png", "image_1": f"{i}-1.png", "label_0": int(i == 0)}
        row |= {"image_0_uid": f"u{i}0", "image_1_uid": f"u{i}1", "score_0": i, "score_1": -i, "weight": 2 + i}
        rows.append({**row, "year": 2024, **more})
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[1], "prompt": ""}]))
    return file


def chosen(table: PairTable) -> dict[str, tuple[int, int]]:
    """The greys of each prompt's chosen and rejected image."""
    return {p.prompt: (p.chosen.open().getpixel((0, 0))[0], p.rejected.open().getpixel((0, 0))[0]) for p in table}


@pytest.mark.parametrize("name", ["new.parquet", "new.jsonl", "new"])
def test_marks_change_the_labels_that_they_name_and_nothing_else(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = ["--without", "score_0", "user"] if name == "new" else []  # a folder has no place for them
    source, out, marks = write_source(tmp_path, user=7), tmp_path / name, tmp_path / "decisions.csv"
    before = source.read_bytes()
    marks.write_text(f'{HEAD}\nu00:u01,swap,"p0, a",0\nu20:u21,drop,"p2, a",1\nu30:u31,keep,"p3, a",1\n')
    command = ["data", "relabel", str(source), "--decisions", str(marks), "--out", str(out)]
    main([*command, *without])
    said = capsys.readouterr().out
    assert f"{out}: 3 pairs: 1 with the label swapped, 2 as they were; 1 dropped; rows that are no usable" in said
    assert "(1 empty prompt)" in said
    assert "without the columns" in said
    assert "year" in said
    assert "diffalign data check" in said
    assert source.read_bytes() == before
    table = open_pairs(out)
    assert table.problems == []
    assert chosen(table) == {"p0, a": (100, 0), "p1, a": (110, 10), "p3, a": (130, 30)}
    assert [table.number("weight", i) for i in range(3)] == [2, 3, 5]
    if name != "new":
        assert table.ids == ["u00:u01", "u10:u11", "u30:u31"]  # so that random draws stay
        assert [table.scores(i) for i in range(3)] == [(0, 0), (-1, 1), (-3, 3)]
        assert table.column("user") == ["7"] * 3
        marks.write_text(marks.read_text().replace('u20:u21,drop,"p2, a",1\n', ""))
        assert "applied already" in fails(capsys, *command[:2], str(out), *command[3:-1], str(tmp_path / "again.jsonl"))
    assert ("exists; name another" if name == "new.parquet" else "is not an empty folder") in fails(capsys, *command)


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ("id,decision\nnobody,swap\n", "line 2: {pairs} has no usable pair 'nobody' (1 of 1 decisions"),
        ("id,decision\nu00:u01,flip\n", "line 2: decision = 'flip'; it is one of keep, swap, drop"),
        ("id,decision\nu00:u01,swap\nu00:u01,drop\n", "line 3: the pair 'u00:u01' is decided about in"),
        ("id,decision,prompt\nu00:u01,swap,another\n", "line 2: the prompt is 'another', and pairs.jsonl line 1"),
        ("id,decision,chosen_image\nu00:u01,swap,1\n", "line 2: image 1 of the pair was the chosen one"),
        ("id,decision,chosen_image\nu00:u01,swap,2\n", "line 2: chosen_image = '2'; it is 0 or 1"),
        ("id,decision\nu00:u01,swap,x\n", "line 2"),
        ("id,decision\n,swap\n", "line 2: there is no id"),
        ("id,mark\nu00:u01,swap\n", "has the columns id, mark and no decision"),
        ("id,decision\n", "has no rows"),
    ],
)
def test_decisions_about_other_pairs_are_refused(
    marks: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, file, out = write_source(tmp_path), tmp_path / "decisions.csv", tmp_path / "new.parquet"
    file.write_text(marks)
    message = fails(capsys, "data", "relabel", str(source), "--decisions", str(file), "--out", str(out))
    assert said.format(pairs=source) in message
    assert "decisions.csv" in message
    assert not out.exists()


def test_what_cannot_be_relabelled_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, file = write_source(tmp_path, margin=0.5), tmp_path / "decisions.csv"
    file.write_text("id,decision\nu00:u01,swap\n")
    relabel = ["data", "relabel", str(source), "--decisions", str(file), "--out"]
    out = str(tmp_path / "new.parquet")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    for command, said in (
        ([*relabel, out], "decisions.csv line 2 swaps labels, and"),
        ([*relabel, str(source), "--overwrite"], "are not changed; name another place"),
        ([*relabel, "new.csv"], "to a .parquet file, to a .jsonl file"),
        ([*relabel, str(tmp_path / "full")], "is not an empty folder"),
        ([*relabel, str(tmp_path / "new"), "--without", "margin"], "no place for score_0, score_1; name a .parquet"),
        ([*relabel, out, "--confident", "0.5"], "--confident belongs to --by RUN"),
        ([*relabel[:2], *relabel[3:], out], "PAIRS is missing"),
        ([*relabel[:2], "--by", str(tmp_path), "--out", out, "--split", "test"], "--split belongs to PAIRS"),
        ([*relabel[:2], "--by", str(tmp_path), "--out", out], "so it is no run"),
    ):
        assert said in fails(capsys, *command)
    everything = tmp_path / "all.csv"
    everything.write_text("id,decision\n" + "".join(f"u{i}0:u{i}1,drop\n" for i in range(ROWS)))
    assert "all 4 pairs of" in fails(capsys, *relabel[:4], str(everything), "--out", out)
    main([*relabel, out, "--without", "margin"])
    assert chosen(open_pairs(out, DataSpec()))["p0, a"] == (100, 0)
