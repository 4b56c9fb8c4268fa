"""The page of a run from files written by hand: a resumed run, half a line, values that are not finite, odd texts."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.errors import MissingFileError
from diffalign.io.files import hash_file
from diffalign.pages.run_page.charts import HISTOGRAMS, POINTS, chart_data, margin_data, rates
from diffalign.pages.run_page.data import RunData, RunState, flattened, read_run, thinned
from diffalign.pages.run_page.figures import Change, Interval, duration, figures
from diffalign.pages.run_page.page import IMAGES, VENDOR, run_page

ODD = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
SETTINGS: dict[str, Any] = {
    "objective": {"name": "dpo", "beta": 2000.0},
    "training": {"max_train_steps": 40, "logging_steps": 10},
    "validation": {"prompts": [ODD]},
    "health": {"action": "warn"},
}
RUNNING = RunState("running", step=33)


def write_lines(path: Path, *lines: dict[str, Any], end: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 40 steps that was killed at step 25, resumed from step 20, and is at step 33."""
    folder = tmp_path / "dpo"
    (folder / "validation").mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    write_lines(
        folder / "metrics.jsonl",
        {"step": 10, "loss": 0.7, "implicit_acc": 0.5, "error/policy/q1": 0.4, "error/reference/q1": 0.5, "mine": 1},
        {"step": 20, "loss": math.nan, "implicit_acc": 0.6, "heldout/accuracy": 0.55, "unet_forwards": 80},
        {"step": 25, "loss": 9.0},
        {"step": 20, "loss": None, "implicit_acc": 0.6, "heldout/accuracy": 0.55, "heldout/accuracy/low": 0.4,
         "heldout/accuracy/high": 0.7, "unet_forwards": 80},
        {"step": 30, "loss": 0.5, "implicit_acc": 0.8, "rollout/valid": 0.25, "unet_forwards": 120},
        end='{"step": 40, "lo',
    )  # fmt: skip
    counts = [0] * 33
    counts[16], counts[20] = 3, 1
    write_lines(folder / "margins.jsonl", {"step": 10, "width": 0.25, "counts": counts})
    write_lines(
        folder / "timing.jsonl",
        {"step": 0, "seconds": 0.0, "pairs": 0},
        {"step": 10, "seconds": 10.0, "pairs": 20},
        {"step": 20, "seconds": 15.0, "pairs": 40},
        {"step": 30, "seconds": 20.0, "pairs": 60},
    )
    write_lines(
        folder / "health.jsonl",
        {"step": 20, "rule": "drift", "action": "warn", "says": f"drift: {ODD}"},
        {"step": 10, "at": 30, "rule": "displacement", "action": "roll_back", "says": "displaced"},
    )
    (folder / "run.json").write_text(json.dumps({"device": "cpu", "versions": {"torch": "2.11"}}))
    for step in (9, 100):
        Image.new("RGB", (8, 8)).save(folder / "validation" / f"step-{step:06d}.png")
    (folder / "validation" / "step-000200.png").write_bytes(b"\x89PNG half")
    return folder


def read(folder: Path, state: RunState = RUNNING, **options: Any) -> RunData:
    return read_run(folder, SETTINGS, state, **options)


def chart(run: RunData, title: str) -> dict[str, Any]:
    return next(chart for chart in chart_data([run]) if chart["title"] == title)


def embedded(page: str, name: str) -> Any:
    return json.loads(re.findall(rf'<script type="application/json" id="{name}-data">(.*?)</script>', page)[0])


def test_a_resumed_run_is_read_as_it_went_on(folder: Path) -> None:
    run = read(folder)
    assert run.series("loss") == ([10, 20, 30], [0.7, None, 0.5])  # step 25 was taken again; half a line is no line
    assert run.problems == ["metrics.jsonl: 1 incomplete line left out"]
    assert run.step == 33
    assert [step for step, _ in run.images] == [9, 100, 200]


def test_an_integer_beyond_floats_is_a_gap(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 0.7}', f'{{"step": 2, "loss": 1{"0" * 400}}}', f'{{"step": 1{"0" * 400}}}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read(tmp_path).series("loss") == ([1, 2], [0.7, None])


def test_every_metric_is_drawn(folder: Path) -> None:
    run = read(folder, start_loss=math.log(2))
    loss = chart(run, "Loss")
    assert loss["tables"] == [
        {"run": 0, "x": [10, 20, 30], "of": 3, "series": [{"label": "loss", "y": [0.7, None, 0.5]}]}
    ]
    assert loss["level"] == {"label": "ln 2: policy = reference", "at": math.log(2)}
    ratio = chart(run, "Policy error ÷ reference error")
    assert ratio["tables"][0]["series"] == [{"label": "q1", "y": [0.8]}]
    heldout = chart(run, "Accuracy on held-out pairs")
    assert heldout["tables"][0] == {
        "run": 0, "x": [20], "of": 1, "series": [{"label": "held-out", "y": [0.55], "low": [0.4], "high": [0.7]}],
    }  # fmt: skip
    assert [series["label"] for table in heldout["tables"] for series in table["series"]] == [
        "held-out",
        "training pairs",
    ]
    assert "Margin on held-out pairs" not in {each["title"] for each in chart_data([run])}
    assert chart(run, "mine")["tab"] == chart(run, "rollout/valid")["tab"] == "other"
    assert chart(run, "Pairs per second")["tables"][0]["series"][0]["y"] == [2.0, 4.0, 4.0]
    assert margin_data([run])[0]["steps"] == [10]
    assert chart_data([read(folder)])[0]["level"] is None  # of an objective whose loss has no such start


def test_figures_by_hand(folder: Path) -> None:
    found = figures(read(folder))
    assert found.loss == Change(0.7, 0.5, 1)
    assert found.accuracy == Change(0.5, 0.8, 1)
    assert found.heldout == Interval(0.55, 0.55, 0.4, 0.7, 20)
    assert (found.pairs, found.seconds, found.pairs_per_second, found.forwards) == (60, 20.0, 3.0, 120)
    assert found.seconds_left == pytest.approx(7 * 20 / 30)  # 7 steps at 30 in 20 seconds
    assert found.reports == [f"step 20: drift: {ODD}", "step 30: displaced (back to step 10)"]
    assert figures(read(folder, RunState("finished"))).seconds_left is None
    assert [duration(x) for x in (47.6, 725, 11220)] == ["48 s", "12 min 05 s", "3 h 07 min"]


def test_the_page_escapes_what_comes_from_data_and_is_the_same_each_time(folder: Path) -> None:
    page = run_page([read(folder, name=ODD)], now=1e9)
    assert page == run_page([read(folder, name=ODD)], now=1e9)
    assert ODD not in page
    assert "<img src=x" not in page
    assert page.count("<script>") == 2  # uPlot and the page's own
    assert "Written 2001-09-09 01:46:40 UTC" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is fetched
    assert "step-000200.png cannot be read as an image" in page
    assert embedded(page, "image")[0]["steps"] == [9, 100]
    assert embedded(page, "page")["running"] is True


def test_a_run_that_ended_says_why(folder: Path) -> None:
    page = run_page([read(folder, RunState("ended", f"TrainingError: {ODD}"))], now=0)
    assert "ended early" in page
    assert "TrainingError: &lt;/script&gt;" in page
    assert embedded(page, "page")["running"] is False


def test_what_is_missing_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    page = run_page([read_run(tmp_path, {"health": {"action": "none"}}, RunState("running"))], now=0)
    for key in ("training.logging_steps", "validation.prompts", "validation.pairs", "health.action: none"):
        assert f"<code>{key}</code>" in page
    for text in ("No histogram of margins", "No held-out pairs", "No times"):
        assert text in page
    with pytest.raises(
        MissingFileError, match=r"is not the folder of a run: it has neither config\.yaml nor metrics\.jsonl"
    ):
        read_run(tmp_path / "validation", {}, RUNNING)


def test_of_several_runs_only_the_settings_that_differ_are_shown(folder: Path) -> None:
    other = {**SETTINGS, "objective": {"name": "ipo", "beta": 2000.0}, "seed": 7}
    runs = [read(folder, name="a"), read_run(folder, other, RUNNING, name="b")]
    page = run_page(runs, now=0)
    table = page.partition("Settings that differ")[2].partition("</table>")[0]
    assert re.findall(r"<code>(.*?)</code>", table) == ["objective.name", "seed"]
    assert re.findall(r"<td>(.*?)</td>", table) == ["dpo", "ipo", "–", "7"]
    assert {table["run"] for chart in chart_data(runs) for table in chart["tables"]} == {0, 1}
    assert flattened({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_vendored_files_are_those_that_their_list_names() -> None:
    rows = re.findall(r"^\| `(.+?)` .* ([0-9a-f]{64}) \|$", (VENDOR / "README.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == ["uPlot.iife.min.js", "uPlot.min.css"]
    assert [hash_file(VENDOR / name) for name, _ in rows] == [stated for _, stated in rows]


def test_a_thinned_curve_has_the_extremes_the_ends_and_the_gaps() -> None:
    values: list[float | None] = [float(i % 7) for i in range(1000)]
    values[123], values[456], values[789] = 50.0, -50.0, None
    shown = thinned([values], 100)
    assert {0, 123, 456, 789, 999} <= set(shown)
    assert len(shown) <= 100 + 50 + 2
    assert shown == sorted(shown)
    assert thinned([values[:100]], 100) == list(range(100))
    two = thinned([values, values[::-1]], 100)
    assert {123, 456, 999 - 123, 999 - 456} <= set(two)


def test_a_long_run_has_a_small_page(tmp_path: Path) -> None:
    """3,000 log lines of all metrics of a run with held-out pairs: less than a megabyte of data."""
    (tmp_path / "validation").mkdir()
    (tmp_path / "config.yaml").write_text("")
    names = ["loss", "implicit_acc", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
             "logit/abs", "gradient_factor", "saturated", "displacement", "grad_norm", "lr", "unet_forwards",
             *(f"error/{who}/q{q}" for who in ("policy", "reference") for q in (1, 2, 3, 4)),
             *(f"heldout/{what}{end}" for what in ("accuracy", "margin", "loss")
               for end in ("", "/low", "/high", "/q1", "/q2", "/q3", "/q4"))]  # fmt: skip
    rows = [
        {"step": s, **{name: math.sin(s * k + 0.1) + 1.23456789 for k, name in enumerate(names)}} for s in range(3000)
    ]
    write_lines(tmp_path / "metrics.jsonl", *rows)
    write_lines(tmp_path / "margins.jsonl", *({"step": s, "width": 0.25, "counts": [s] * 33} for s in range(3000)))
    write_lines(tmp_path / "timing.jsonl", *({"step": s, "seconds": s / 3, "pairs": 7 * s} for s in range(3000)))
    for step in range(3 * IMAGES):
        Image.new("RGB", (2, 2)).save(tmp_path / "validation" / f"step-{step}.png")
    run = read_run(tmp_path, {}, RUNNING)
    page = run_page([run], now=0)
    assert sum(len(json.dumps(embedded(page, name))) for name in ("chart", "margin")) < 1e6
    assert max(len(table["x"]) for each in embedded(page, "chart") for table in each["tables"]) < 2 * POINTS
    assert len(embedded(page, "margin")[0]["steps"]) == HISTOGRAMS
    assert embedded(page, "image")[0]["steps"][::23] == [0, 3 * IMAGES - 1]
    assert len(rates(run)[0]) == 2999
