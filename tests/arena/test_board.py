"""The leaderboard: its figures for images with known rewards, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.arena.board import gain, guards, interval, leaderboard_row, leaderboard_table, ranked
from diffalign.arena.entries import entries
from diffalign.arena.jobs import FinishedJob
from diffalign.evaluation.manifest import GeneratedImage
from diffalign.rewards import load_scorer
from diffalign.world.captions import parse, prompts
from diffalign.world.render import render

PROMPTS = prompts("heldout")[:6]
LINE = {"step": 1, "loss": 0.69, "unet_forwards": 8, "implicit_acc": 0.5}


def run(folder: Path, seed: int, failed: str | None = None) -> FinishedJob:
    """Three renders of each prompt, as a run's images."""
    folder.mkdir()
    rng, pictures = np.random.default_rng(seed), []
    for number, prompt in enumerate(PROMPTS):
        for k, pixels in enumerate(render([parse(prompt)] * 3, rng)):
            file = folder / f"{number}_{k}.png"
            Image.fromarray(pixels).save(file)
            pictures.append(GeneratedImage(prompt, k, file))
    config = {"source": None, "data": {"path": f"{folder}/mine.parquet"}}
    return FinishedJob(config, [] if failed else pictures, [LINE], 1.5, "abc", failed)


def scores(done: FinishedJob, name: str) -> np.ndarray:
    shown = [picture.open() for picture in done.pictures]
    return load_scorer(name).score(shown, [picture.prompt for picture in done.pictures]).double().numpy()


@pytest.mark.parametrize("preference", ["world", "world-size"])
def test_a_line_is_the_mean_difference_in_the_preferences_reward(tmp_path: Path, preference: str) -> None:
    base, one, two = (run(tmp_path / str(seed), seed) for seed in (0, 1, 2))
    (entry,) = entries(("dpo",))
    row = leaderboard_row(entry, [one, two], base, preference)
    differences = [scores(done, preference) - scores(base, preference) for done in (one, two)]
    assert row["rewards"][preference]["gain"][0] == pytest.approx(float(np.mean(differences)), abs=1e-6)
    assert row["gain_by_run"][preference] == pytest.approx([float(d.mean()) for d in differences], abs=1e-6)
    low, high = row["rewards"][preference]["gain"][1:]
    assert low < row["rewards"][preference]["gain"][0] < high
    assert (row["runs"], row["steps"], row["unet_forwards"]) == (2, [1, 1], [8, 8])
    assert row["curves"] == {"step": [1], "loss": [0.69], "implicit_acc": [0.5]}
    assert row["commits"] == ["abc"]
    assert row["paper"].startswith("Wallace")
    assert row["config"]["data"] == {"path": "pairs/mine.parquet"}  # no path of this machine


def test_the_same_images_gain_nothing(tmp_path: Path) -> None:
    base = run(tmp_path / "base", 0)
    (entry,) = entries(("dpo",))
    row = leaderboard_row(entry, [base], base, "world")
    assert row["rewards"]["world"]["gain"] == [0, 0, 0]
    assert row["rewards"]["world"]["win_rate"][0] == 0.5
    assert row["guards"] == []


def test_a_failed_run_is_said_and_comes_last(tmp_path: Path) -> None:
    base, good = run(tmp_path / "base", 0), run(tmp_path / "good", 1)
    dpo, flipped = entries(("dpo", "flipped"))
    rows = [
        leaderboard_row(dpo, [good, run(tmp_path / "bad", 2, "the loss is nan")], base, "world"),
        leaderboard_row(flipped, [good], base, "world"),
    ]
    assert [row["name"] for row in ranked(rows, "world")] == ["flipped", "dpo"]
    assert gain(rows[0], "world") == float("-inf")
    lines = leaderboard_table(rows, "world").splitlines()
    assert "failed: the loss is nan" in lines[3]
    assert lines[2].startswith("| *flipped* (control) | ")
    assert len({line.count("|") for line in lines}) == 1


def test_guards_speak() -> None:
    assert guards(-0.029, 0.86) == []
    assert guards(-0.031, 0.86) == ["faithfulness"]
    assert guards(0.1, 0.5) == ["diversity"]
    assert guards(-0.2, 0.5) == ["faithfulness", "diversity"]


def test_intervals_in_words() -> None:
    assert interval([0.1234, -0.0001, 0.2], "+.3f") == "+0.123 [+0.000, +0.200]"
    assert interval([0.5, 0.4, 0.6], ".2f") == "0.50 [0.40, 0.60]"


def test_the_table_marks_what_a_gain_was_paid_with(tmp_path: Path) -> None:
    base = run(tmp_path / "base", 0)
    (entry,) = entries(("dpo",))
    row: dict[str, Any] = leaderboard_row(entry, [run(tmp_path / "one", 1)], base, "world")
    shown = leaderboard_table([row | {"guards": []}], "world").splitlines()[2].split(" | ")
    assert shown[3:5] == [interval(row["accuracy"]["change"], "+.3f"), interval(row["diversity"], ".2f")]
    low, high = row["accuracy"]["change"][1:]
    assert low < row["accuracy"]["change"][0] < high
    row |= {"guards": ["faithfulness"]}
    assert "| **+0." in leaderboard_table([row], "world") or "| **-0." in leaderboard_table([row], "world")
