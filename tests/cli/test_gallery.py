"""`diffalign gallery`, and `evaluate --page`, on a tiny base with a LoRA."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from diffalign.cli.main import main
from diffalign.models.adapters.lora import add_lora, save_lora
from diffalign.models.loading.base import load_base
from tests.cli.test_main import fails
from tests.models.conftest import move_lora

JUDGE = "tests.sources.judges:Brightness"  # the mean of all pixels
SAMPLING = ["--prompts", "a red circle", "--seeds", "0-1", "--steps", "1", "--resolution", "32", "--guidance", "1"]


@pytest.fixture(scope="module")
def lora(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = load_base(str(tiny_sdxl))
    add_lora(base.unet, rank=4)
    move_lora(base.unet, by=0.5)
    return save_lora(base.unet, tmp_path_factory.mktemp("lora"), base.family)


def data(page: Path, name: str) -> Any:
    found = re.search(rf'id="{name}">(.*?)</script>', page.read_text())
    assert found is not None
    return json.loads(found[1])


def test_strengths_are_generated_once_and_zero_is_the_base(
    tiny_sdxl: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["gallery", str(tiny_sdxl), "--tuned", f"dpo={lora}", *SAMPLING, "--out", str(out), "--scorer", JUDGE]
    main([*command, "--strengths", "1,0,-1"])
    found = data(out / "gallery.html", "strengths")
    assert (found["strengths"], found["models"]) == ([-1, 0, 1], ["dpo"])
    cells = [row["cells"][0] for row in found["rows"]]
    assert [at_zero for _, at_zero, _ in cells] == [row["base"] for row in found["rows"]]
    assert len({place for row in cells for place in row}) == 6
    scores = {row["scores"][0][2][0] for row in found["rows"]}
    folders = list((out / "images").iterdir())
    images = {folder: [file.stat().st_mtime_ns for file in folder.glob("*.png")] for folder in folders}
    assert len(images) == 3  # the base, -1 and 1
    assert "gallery.html exists" in fails(capsys, *command)
    main([*command, "--strengths", "0,1", "--overwrite"])
    assert {row["scores"][0][1][0] for row in data(out / "gallery.html", "strengths")["rows"]} == scores
    assert images == {folder: [file.stat().st_mtime_ns for file in folder.glob("*.png")] for folder in folders}


def test_evaluate_writes_its_page(tiny_sdxl: Path, lora: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = ["evaluate", str(tiny_sdxl), "--tuned", f"dpo={lora}", *SAMPLING, "--out", str(tmp_path / "out")]
    main([*command, "--scorer", JUDGE, "--page", str(page)])
    rows = [json.loads(line) for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]
    found = data(page, "comparison")
    (judge,) = (scorer["name"] for scorer in found["scorers"])
    assert [row["scores"][0] for row in found["rows"]] == [
        [row[judge] for row in rows if row["seed"] == seed] for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tuned", "a=x", "--tuned", "a=y"], "--tuned a=…: give each model once"),
        (["--tuned", "base=x"], "--tuned base=…: give each model once"),
        (["--tuned", "a=x", "--strengths", "0,50"], "give numbers from -10 to 10"),
        (["--tuned", "a=x", "--user", "ben", "--users", "u.json"], "--user: weights that were tuned for users"),
    ],
)
def test_senseless_galleries_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in fails(capsys, "gallery", "BASE", *words, "--prompts", "a cat", "--out", "out")
