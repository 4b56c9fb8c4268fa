"""`diffalign compare`, `score` and `label` on painted images with known scores."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from diffalign.cli.main import main
from diffalign.data.table.open import open_pairs
from diffalign.evaluation.grid import comparison_grid
from tests.cli.test_main import fails

JUDGE = "tests.sources.judges:Brightness"  # the mean of all pixels
SECOND = [20, 30, 40, 50, 50, 60]  # of the better images, prompt by prompt
PROMPTS = ("a red circle", "a blue square", "a small photo")


def paint(folder: Path, levels: Mapping[str, list[int]]) -> Path:
    """Images of one grey level each: prompt -> level by seed."""
    folder.mkdir()
    lines = []
    for p, (prompt, greys) in enumerate(levels.items()):
        for seed, grey in enumerate(greys):
            Image.new("RGB", (16, 16), (grey,) * 3).save(folder / f"{p}_{seed}.png")
            lines.append(json.dumps({"file": f"{p}_{seed}.png", "prompt": prompt, "seed": seed}) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return paint(tmp_path / "base", dict(zip(PROMPTS, ([10, 20], [30, 40], [50, 60]), strict=True)))


@pytest.fixture
def better(tmp_path: Path) -> Path:
    return paint(tmp_path / "better", dict(zip(PROMPTS, ([20, 30], [40, 50], [50, 60]), strict=True)))


def test_compare_prints_the_table_and_writes_it(
    base: Path, better: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two prompts gain 10, one nothing: 6.667 on average, 4 wins and 2 ties."""
    out = tmp_path / "out"
    main(["compare", str(base), f"dpo={better}", f"dpo={better}", "--scorer", JUDGE, "--out", str(out)])
    said = capsys.readouterr().out
    assert "+6.667" in said
    assert "8/4/0" in said  # two runs
    assert {file.name for file in out.iterdir()} == {"result.json", "table.txt", "scores.jsonl", "grid.png"}
    assert (out / "table.txt").read_text().strip() in said
    assert len((out / "scores.jsonl").read_text().splitlines()) == 18
    text = "".join(f"{prompt}\n" for prompt in PROMPTS)
    assert json.loads((out / "result.json").read_text())["prompt_set"] == {
        "count": 3,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "set": None,
        "verified": False,
    }


def test_compare_writes_a_page_of_every_run(
    base: Path, better: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the base's order, whatever the order of the others' manifests."""
    manifest, page = better / "manifest.jsonl", tmp_path / "page.html"
    manifest.write_text("".join(reversed(manifest.read_text().splitlines(keepends=True))))
    command = ["compare", str(base), f"dpo={better}", f"dpo={better}", "--scorer", JUDGE]
    main([*command, "--page", str(page), "--page-title", "A & B"])
    assert "images of at most 512 pixels" in capsys.readouterr().out
    text = page.read_text()
    found = re.search(r'id="comparison">(.*?)</script>', text)
    assert found is not None
    data = json.loads(found[1])
    assert "<h1>A &amp; B</h1>" in text
    assert data["columns"] == ["base", "dpo, run 1", "dpo, run 2"]
    assert [row["scores"][0] for row in data["rows"]] == [[x, y, y] for x, y in zip(range(10, 70, 10), SECOND)]
    assert "--overwrite" in fails(capsys, *command, "--page", str(page))
    assert "give --page FILE.html" in fails(capsys, *command, "--page-note", "x")


def test_the_grid_shows_one_seed_in_a_row(
    base: Path, better: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order of the manifests: the base's first seed of each prompt."""
    manifest = better / "manifest.jsonl"
    manifest.write_text("".join(reversed(manifest.read_text().splitlines(keepends=True))))
    shown = {}

    def watched(prompts: list[str], columns: dict[str, list[Image.Image]]) -> Image.Image:
        shown.update({name: [image.getpixel((0, 0))[0] for image in images] for name, images in columns.items()})
        return comparison_grid(prompts, columns)

    monkeypatch.setattr("diffalign.evaluation.evaluate.comparison_grid", watched)
    main(["compare", str(base), f"dpo={better}", "--scorer", JUDGE, "--out", str(tmp_path / "out")])
    assert shown == {"base": [10, 30, 50], "dpo": [20, 40, 50]}


def test_missing_images_are_named(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.dumps("what was there")
    (base / "scores.jsonl").write_text(before)
    (base / "1_0.png").unlink()
    said = "names 6 images, and 1 of them do not exist (first: 1_0.png)"
    out = str(tmp_path / "pairs.parquet")
    for command in (["score", str(base)], ["label", str(base), "--out", out], ["compare", str(base), f"a={base}"]):
        assert said in fails(capsys, *command, "--scorer", JUDGE)
    (base / "manifest.jsonl").write_text("")
    assert "generate some first" in fails(capsys, "score", str(base), "--scorer", JUDGE)
    assert (base / "scores.jsonl").read_text() == before


def test_compare_refuses_what_does_not_match(
    base: Path, better: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = paint(tmp_path / "odd", {PROMPTS[0]: [1, 2]})
    for others, said in (
        ([f"dpo={odd}"], "images have no partner"),
        ([str(better)], "write NAME=PATH"),
        ([f"base={better}"], "give another"),
        ([f"dpo={tmp_path}"], "manifest.jsonl does not exist"),
    ):
        assert said in fails(capsys, *["compare", str(base), *others, "--scorer", JUDGE])


def test_scores_and_results_that_are_there_stay(
    base: Path, better: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for file in (base / "scores.jsonl", out / "result.json"):
        file.write_text("mine")
    score, compare = ["score", str(base)], ["compare", str(base), f"a={better}", "--out", str(out)]
    for command, file in ((score, base / "scores.jsonl"), (compare, out / "result.json")):
        message = fails(capsys, *command, "--scorer", JUDGE)
        assert f"{file} exists; name another file, or give --overwrite" in message
        assert file.read_text() == "mine"
        main([*command, "--scorer", JUDGE, "--overwrite"])
        assert file.read_text() != "mine"
    capsys.readouterr()


def test_score_writes_every_images_score(base: Path, better: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["score", str(base), str(better), "--scorer", JUDGE, "--scorer", "tests.sources.judges:Indifferent"])
    said = capsys.readouterr().out
    assert f"{base}: brightness 35.0000 on average of 6 images (10.0000 to 60.0000)" in said
    assert f"{better}: indifferent 0.0000" in said
    rows = [json.loads(line) for line in (base / "scores.jsonl").read_text().splitlines()]
    assert [row["brightness"] for row in rows] == [10, 20, 30, 40, 50, 60]


def test_label_makes_pairs_that_are_read(
    base: Path, better: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Best over worst of each prompt over both folders, with the images' bytes; a tie and a single one left out."""
    more = paint(tmp_path / "more", {"all alike": [7, 7], "alone": [9]})
    out = tmp_path / "pairs.parquet"
    main(["label", str(base), str(better), str(more), "--scorer", JUDGE, "--out", str(out)])
    assert "3 pairs; prompts left out: 1 with a tie, 1 with one image" in capsys.readouterr().out
    table = open_pairs(out)
    assert table.problems == []
    assert tuple(table.prompts) == PROMPTS
    assert [table.scores(i) for i in range(3)] == [(30, 10), (50, 30), (60, 50)]
    greys = [
        (table[i].chosen.open().getpixel((0, 0))[0], table[i].rejected.open().getpixel((0, 0))[0]) for i in range(3)
    ]
    assert greys == [(30, 10), (50, 30), (60, 50)]
    assert table[0].chosen.read() == (better / "0_1.png").read_bytes()
    main(["label", str(base), "--scorer", JUDGE, "--tie", "9.5", "--out", str(tmp_path / "wide.parquet")])
    assert len(open_pairs(tmp_path / "wide.parquet")) == 3


def test_label_refuses_before_it_writes(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs.parquet"
    for arguments, said in (
        (["--out", str(tmp_path / "pairs.jsonl")], "a .parquet file"),
        (["--out", str(out), "--tie", "11"], "no pair is left of 3 prompts: 0 have one image, and of 3"),
        (["--out", str(out), "--scorer", "world"], "one --scorer"),
    ):
        assert said in fails(capsys, *["label", str(base), "--scorer", JUDGE, *arguments])
    assert "is not a caption" in fails(capsys, *["label", str(base), "--scorer", "world", "--out", str(out)])
    assert not out.exists()
    assert [file for file in tmp_path.iterdir() if "partial" in file.name] == []
    out.write_bytes(b"something")
    assert "exists; name another file" in fails(capsys, *["label", str(base), "--scorer", JUDGE, "--out", str(out)])
    assert out.read_bytes() == b"something"
