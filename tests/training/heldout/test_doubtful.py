"""Doubtful pairs: the ranking by hand and with planted flips, and the command on a run."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffalign import DiffalignError
from diffalign.cli.main import main
from diffalign.config.schema import Config
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.training.heldout.doubtful import doubtful_pairs, point_weights, ranked
from diffalign.training.heldout.measure import PointValues
from diffalign.training.run import run_training
from diffalign.world import base_path, pairs_path
from tests.training.heldout.test_measure import FEW

MakeConfig = Callable[..., Config]


def points(margins: np.ndarray) -> list[PointValues]:
    times = [100, 900]
    return [PointValues(i, k, times[k], 0.0, float(m)) for i, row in enumerate(margins) for k, m in enumerate(row)]


def test_the_ranking_by_hand() -> None:
    """Two points with spreads 1 and 100: each counts alike once divided by its spread."""
    margins = np.array([[1.0, 100.0], [-1.0, -100.0], [1.0, -100.0], [-1.0, 100.0]])
    first, *_, last = ranked(points(margins), set(), 1000)
    t = math.tanh(1.0)
    assert (first.index, last.index) == (1, 0)
    assert (first.score, last.score) == (pytest.approx(-t), pytest.approx(t))
    assert (first.margin, first.agreeing, first.error) == (pytest.approx(-50.5), 0.0, pytest.approx(0))
    middle = ranked(points(margins), set(), 1000)[1]
    assert (middle.index, middle.score, middle.worst_quarter) == (2, pytest.approx(0), 4)
    assert middle.error == pytest.approx(t / math.sqrt(2))  # two points at ±t: deviations t, each with weight 1/2


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(DiffalignError, match="none of the run's pairs can be read"):
        ranked([], set(), 1000)
    with pytest.raises(DiffalignError, match=r"margins of 1 pairs are not finite .first: pair 1"):
        ranked(points(np.array([[1.0, 2.0], [1.0, math.nan]])), set(), 1000)


def test_points_count_by_what_they_predict_of_held_out_pairs() -> None:
    margins = np.array([[1.0, 1.0, 5.0], [1.0, -1.0, -5.0], [1.0, 1.0, -5.0], [-1.0, 1.0, -5.0]])
    heldout = np.array([True, True, True, False])
    assert point_weights(margins, heldout) == pytest.approx([0.75, 0.25, 0.0])  # accuracies 1, 2/3 and 1/3
    assert point_weights(margins, ~heldout) == pytest.approx([0.0, 1.0, 0.0])
    assert point_weights(-margins, heldout) == pytest.approx([0.0, 0.0, 1.0])
    assert point_weights(-np.abs(margins), heldout) == pytest.approx([1 / 3] * 3)
    (only,) = [doubt for doubt in ranked(points(margins[:, :2]), {0, 1, 2}, 1000) if not doubt.heldout]
    assert only.index == 3


def test_planted_flips_are_found_where_margins_predict_labels() -> None:
    """Margins of 3 standard deviations: the flipped tenth is nearly all of the first tenth."""
    rng = np.random.default_rng(0)
    flipped = np.arange(400) < 40
    margins = rng.normal(3.0, 1.0, (400, 2)) * np.where(flipped, -1, 1)[:, None] * [1.0, 50.0]
    found = [doubt.index for doubt in ranked(points(margins), set(), 1000)[:40]]
    assert sum(flipped[found]) >= 39


def test_the_command_ranks_every_pair_and_shows_the_first(make_config: MakeConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    few = {**FEW, "output_dir": str(run), "training.max_train_steps": 2, "training.learning_rate": 1e-2}
    run_training(make_config(base_path(), {**few, "data.cache_dir": str(tmp_path / "cache")}))
    out, page = tmp_path / "doubtful.csv", tmp_path / "doubtful.html"
    main(["data", "doubtful", str(run), "--out", str(out), "--page", str(page), "--top", "3", "--points", "4"])
    rows = list(csv.DictReader(out.open()))
    table = open_pairs(pairs_path(), DataSpec(max_pairs=24, verify="none"))
    assert {row["id"]: (row["row"], row["prompt"]) for row in rows} == {
        name: (str(i), table.prompts[i]) for i, name in enumerate(table.ids)
    }
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores)
    assert sum(int(row["heldout"]) for row in rows) == 24 - 18
    text = page.read_text()
    assert [rows[k]["id"] in text for k in (0, 2, 3)] == [True, True, False]
    with pytest.raises(SystemExit):  # an existing file is not replaced
        main(["data", "doubtful", str(run), "--out", str(out)])


def test_what_has_no_margins_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"there is no config.yaml, so it is no run"):
        doubtful_pairs(tmp_path)
    from diffalign.config.schema import save_config

    save_config(make_config(base_path(), {"objective": {"name": "sft"}}), tmp_path / "config.yaml")
    with pytest.raises(DiffalignError, match=r"sft compares chosen images, so its model has no margin of a pair"):
        doubtful_pairs(tmp_path)
    save_config(make_config(base_path(), {}), tmp_path / "config.yaml")
    with pytest.raises(DiffalignError, match="no tuned weights at"):
        doubtful_pairs(tmp_path)
