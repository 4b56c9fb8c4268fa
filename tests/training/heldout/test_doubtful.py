"""Doubtful pairs: the ranking by hand and with planted flips, and the command on a run."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign import DiffalignError
from diffalign.cli.main import main
from diffalign.config.schema import Config
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.training.heldout import doubtful
from diffalign.training.heldout.doubtful import Doubt, Doubts, doubtful_pairs, point_weights, ranked
from diffalign.training.heldout.measure import PointValues
from diffalign.training.heldout.pseudo_labels import Selection, pseudo_labels
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


def test_weights_are_averaged_by_hand() -> None:
    """Two weights at one point: bounded margins of ±t each, and the points' error counts one observation."""
    values = points(
        np.array([[1.0, -9.0], [-1.0, -9.0], [1.0, 9.0], [-1.0, 9.0]])
    )  # columns: the first, the last weights
    t = math.tanh(1.0)
    doubts = ranked(values, set(), 1000, weights=2)
    assert [doubt.index for doubt in doubts] == [1, 0, 3, 2]
    assert [doubt.score for doubt in doubts] == pytest.approx([-t, 0, 0, t])
    assert [doubt.error for doubt in doubts] == pytest.approx([0, 0, 0, 0])  # a single point has no error
    # the last weights alone predict the held-out pairs 2 and 3, so they alone count
    assert [d.score for d in ranked(values, {2, 3}, 1000, weights=2)] == pytest.approx([-t, -t, t, t])


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(DiffalignError, match="none of the run's pairs can be read"):
        ranked([], set(), 1000)
    with pytest.raises(DiffalignError, match=r"margins of 1 pairs are not finite .first: pair 1"):
        ranked(points(np.array([[1.0, 2.0], [1.0, math.nan]])), set(), 1000)


def test_points_count_by_what_they_predict_of_held_out_pairs() -> None:
    bounded = np.array([[0.3, 0.3, 0.9], [0.3, -0.3, -0.9], [0.3, 0.3, -0.9], [-0.3, 0.3, -0.9]])
    heldout = np.array([True, True, True, False])
    assert point_weights(bounded[heldout]) == pytest.approx([0.9, 0.1, 0.0])  # means .3, .1 and -.3
    assert point_weights(bounded[~heldout]) == pytest.approx([0.0, 1.0, 0.0])
    assert point_weights(-bounded[heldout]) == pytest.approx([0.0, 0.0, 1.0])
    assert point_weights(-np.abs(bounded)) == pytest.approx([1 / 3] * 3)
    assert point_weights(bounded[:0]) == pytest.approx([1 / 3] * 3)
    (only,) = [doubt for doubt in ranked(points(bounded[:, :2]), {0, 1, 2}, 1000) if not doubt.heldout]
    assert only.index == 3


def test_held_out_pairs_beside_the_ranked_ones_weigh_the_points() -> None:
    """In units of the ranked pairs' spreads 1 and 100, the others' means are tanh(-.5) and tanh(.2)."""
    margins = np.array([[1.0, 100.0], [-1.0, -100.0], [1.0, -100.0], [-1.0, 100.0]])
    others, t = points(np.array([[-0.5, 20.0], [-0.5, 20.0]])), math.tanh(1.0)
    found = {doubt.index: doubt.score for doubt in ranked(points(margins), set(), 1000, others=others)}
    assert found == pytest.approx({0: t, 1: -t, 2: -t, 3: t})  # the second point alone counts
    equal = points(np.array([[0.5, 50.0]]))
    assert ranked(points(margins), set(), 1000, others=equal)[1].score == pytest.approx(0)


def test_the_runs_held_out_pairs_weigh_points_wherever_they_are(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of the run's pairs where other pairs are ranked; other pairs where the run's are."""
    run, other = tmp_path / "run", tmp_path / "other.parquet"
    pq.write_table(pq.read_table(pairs_path()).slice(30, 5), other)
    few = {**FEW, "output_dir": str(run), "training.max_train_steps": 1, "training.learning_rate": 1e-2}
    run_training(make_config(base_path(), few))
    seen: list[np.ndarray] = []
    weigh = doubtful.point_weights
    monkeypatch.setattr(doubtful, "point_weights", lambda bounded: seen.append(bounded) or weigh(bounded))
    assert len(doubtful_pairs(run, points=4, pairs=(str(other), DataSpec())).ranked) == 5
    doubtful_pairs(run, points=4)
    assert [bounded.shape for bounded in seen] == [(6, 4), (6, 4)]
    assert np.array_equal(np.sign(seen[0]), np.sign(seen[1]))  # the same pairs; their margins are in other units
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("  pairs: 0.25\n", f"  pairs: {other}\n"))
    assert len(doubtful_pairs(run, points=4).ranked) == 24
    assert seen[2].shape == (5, 4)
    inverted = doubtful_pairs(run, points=4, pairs=(str(other), DataSpec(invert_preference=True)))
    assert np.array_equal(np.sign(seen[3]), np.sign(seen[2]))  # the labels of the run, not as the pairs are now read
    assert len(inverted.ranked) == 5


def test_planted_flips_are_found_where_margins_predict_labels() -> None:
    """Margins of 3 standard deviations: the flipped tenth is nearly all of the first tenth."""
    rng = np.random.default_rng(0)
    flipped = np.arange(400) < 40
    margins = rng.normal(3.0, 1.0, (400, 2)) * np.where(flipped, -1, 1)[:, None] * [1.0, 50.0]
    found = [doubt.index for doubt in ranked(points(margins), set(), 1000)[:40]]
    assert sum(flipped[found]) >= 39


def test_the_command_ranks_every_pair_and_shows_the_first(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    few = {**FEW, "output_dir": str(run), "training.max_train_steps": 2, "training.learning_rate": 1e-2}
    few |= {"data.cache_dir": str(tmp_path / "cache"), "training.checkpointing_steps": 1}
    run_training(make_config(base_path(), few))
    out, page = tmp_path / "doubtful.csv", tmp_path / "doubtful.html"
    main(["data", "doubtful", str(run), "--out", str(out), "--page", str(page), "--top", "3", "--points", "4"])
    assert f"{run} (checkpoint-1, final weights) rank" in capsys.readouterr().out  # checkpoint-2 is the final weights
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
    alone = [doubtful_pairs(run / "checkpoint-1", points=4), doubtful_pairs(run, points=4, newest=0)]
    assert [doubts.weights for doubts in alone] == [("checkpoint-1",), ("final weights",)]
    first, last = ({doubt.index: doubt.margin for doubt in doubts.ranked} for doubts in alone)
    for row in rows:
        i = int(row["row"])
        assert first[i] != last[i]
        assert float(row["margin"]) == pytest.approx((first[i] + last[i]) / 2, rel=1e-4)
    with pytest.raises(SystemExit):  # nor is one file written twice
        main(["data", "doubtful", str(run), "--out", f"{out}x", "--page", f"{tmp_path}/../{tmp_path.name}/{out.name}x"])
    assert "--out and --page are both" in capsys.readouterr().err
    # the page names the command that applies its marks, and the model can decide by itself
    assert f"diffalign data relabel {pairs_path()} --decisions decisions.csv --out corrected.parquet" in text
    marks, new = tmp_path / "decisions.csv", tmp_path / "new.parquet"
    marks.write_text(f"id,decision\n{rows[0]['id']},swap\n{rows[1]['id']},drop\n")
    main(["data", "relabel", str(pairs_path()), "--decisions", str(marks), "--out", str(new)])
    corrected = open_pairs(new)
    assert len(corrected) == len(open_pairs(pairs_path())) - 1
    place = table.ids.index(rows[0]["id"])
    assert corrected.index.first[corrected.ids.index(rows[0]["id"])] == 1 - table.index.first[place]
    main(
        [
            "data",
            "relabel",
            "--by",
            str(run),
            "--out",
            str(tmp_path / "sure.jsonl"),
            "--points",
            "4",
            "--confident",
            "0.25",
        ]
    )
    sure = open_pairs(tmp_path / "sure.jsonl")
    wanted = sorted(rows, key=lambda row: -abs(float(row["score"])))[:6]  # a quarter of 24
    assert {id: bool(sure.index.first[i]) for i, id in enumerate(sure.ids)} == {
        row["id"]: bool(table.index.first[table.ids.index(row["id"])]) ^ (float(row["score"]) < 0) for row in wanted
    }
    decided = list(csv.DictReader((tmp_path / "sure.decisions.csv").open()))
    assert [row["decision"] for row in decided].count("drop") == 18


def test_pseudo_labels_by_hand(tmp_path: Path) -> None:
    """Scores -.6 .1 .5 -.2: the surer half are the first and the third; a pair that the run trained on stays."""
    rows = [{"prompt": str(i), "chosen": f"{i}.png", "rejected": f"{i}x.png"} for i in range(4)]
    for i in range(4):
        Image.new("RGB", (8, 8), (i,) * 3).save(tmp_path / f"{i}.png")
        Image.new("RGB", (8, 8), (99,) * 3).save(tmp_path / f"{i}x.png")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = open_pairs(tmp_path / "pairs.jsonl")
    scores = [-0.6, 0.1, 0.5, -0.2]
    doubts = [Doubt(i, score, 0.0, 0.0, 0.0, None, False) for i, score in enumerate(scores)]

    def choices(selection: Selection, trained: Sequence[int] = ()) -> list[str]:
        found = Doubts(table, doubts, "pairs", DataSpec(), frozenset(table.ids[i] for i in trained))
        return [each.choice for each in pseudo_labels(found, selection, "run")[0].values()]

    assert choices(Selection(0.5)) == ["swap", "drop", "keep", "drop"]
    assert choices(Selection(0.5, unsure="keep")) == ["swap", "keep", "keep", "keep"]
    assert choices(Selection(None, 0.2)) == ["swap", "drop", "keep", "swap"]
    assert choices(Selection(1.0)) == ["swap", "keep", "keep", "swap"]
    assert choices(Selection(0.1)) == ["drop"] * 4  # a tenth of four rounds to none
    assert choices(Selection(0.3, keep_trained=True), [0]) == ["keep", "drop", "keep", "drop"]  # .3 of three
    del doubts[2]  # a pair that could not be measured
    assert choices(Selection(0.5)) == ["swap", "drop", "drop", "swap"]
    with pytest.raises(DiffalignError, match="one of them"):
        Selection(0.2, 0.5)


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
