"""The page of a run in a browser: tabs and sliders by keys and mouse, and a reload that loses no place."""

from __future__ import annotations

import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.pages.run_page.data import RunData, RunState, read_run
from diffalign.pages.run_page.page import run_page
from tests.browser import Browse

pytestmark = pytest.mark.browser
ODD = "<script>window.broken = 1</script>"


def a_run(folder: Path, kind: str, name: str = ODD) -> RunData:
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("")
    rows = [{"step": s, "loss": 0.7 - s / 1000, "implicit_acc": 0.6, "lr": 1e-5, "mine": s,
             "heldout/accuracy": 0.6, "heldout/accuracy/low": 0.5, "heldout/accuracy/high": 0.7,
             "error/policy/q1": 0.2, "error/reference/q1": 0.25} for s in (10, 20, 30)]  # fmt: skip
    rows[1]["loss"] = None
    for file, lines in {
        "metrics": rows,
        "margins": [{"step": s, "width": 0.25, "counts": [0] * 20 + [s] + [0] * 12} for s in (10, 20, 30)],
        "timing": [{"step": s, "seconds": s / 2, "pairs": 2 * s} for s in (0, 10, 20, 30)],
        "health": [{"step": 20, "rule": "drift", "action": "warn", "says": ODD}],
    }.items():
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, colour in ((10, "red"), (20, "green"), (30, "blue")):
        Image.new("RGB", (40, 40), colour).save(folder / "validation" / f"step-{step:06d}.png")
    settings = {"training": {"max_train_steps": 60}, "validation": {"prompts": [ODD]}}
    state = RunState(kind)  # type: ignore[arg-type]
    return read_run(folder, settings, state, name=name, start_loss=math.log(2))


def written(path: Path, *runs: RunData, now: float = 0) -> Path:
    path.write_text(run_page(runs, now=now), encoding="utf-8")
    return path


def selected(page: Any) -> str:
    return str(page.locator("[role=tab][aria-selected=true]").inner_text())


def test_tabs_and_sliders_work_by_keys_and_mouse(tmp_path: Path, browse: Browse) -> None:
    with browse(written(tmp_path / "run.html", a_run(tmp_path, "finished"))) as page:
        assert page.locator("h1").inner_text() == ODD
        assert page.evaluate("window.broken") is None
        assert selected(page) == "Training"
        titles = page.locator("#panel-training .chart h3").all_inner_texts()
        assert titles[0] == "Loss"
        assert "Policy error ÷ reference error" in titles
        assert page.locator("#panel-training canvas").count() == len(titles) + 1  # and the margins

        page.click("#tab-training")
        page.keyboard.press("ArrowRight")
        assert selected(page) == "Held-out pairs"
        assert page.locator("#panel-heldout canvas").first.bounding_box()["width"] > 300  # drawn once it is shown
        page.keyboard.press("End")
        assert selected(page) == "Other metrics"
        page.keyboard.press("3")
        assert selected(page) == "Images"
        assert page.locator("#panel-training").is_hidden()

        slider = page.locator("#images-step")
        slider.focus()
        last = page.locator("#images figure img").nth(1)  # the first image is that of the first step
        blue = last.get_attribute("src")
        page.keyboard.press("ArrowLeft")
        assert page.locator("#images output").inner_text() == "step 20"
        assert last.get_attribute("src") != blue
        page.click("#images button[data-move='1']")
        assert last.get_attribute("src") == blue
        assert last.get_attribute("alt") == "validation images at step 30"

        page.click("#tab-training")
        page.locator("#margins-step").focus()
        page.keyboard.press("Home")
        assert "step 10, 10 pairs since the log before: 100 % above 0.125" in page.locator("#margins p").inner_text()


def test_a_reload_loses_no_place(tmp_path: Path, browse: Browse) -> None:
    run, path = a_run(tmp_path, "running"), tmp_path / "run.html"
    with browse(written(path, run), viewport={"width": 400, "height": 500}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        page.locator("#margins-step").focus()
        page.keyboard.press("ArrowLeft")
        page.evaluate("scrollTo(0, 700)")
        run.lines[-1]["loss"] = 0.25
        written(path, run)
        page.reload()
        assert "0.25" in page.locator("#panel-training .chart").first.inner_text()
        assert page.evaluate("scrollY") == 700
        assert page.evaluate("document.activeElement.id") == "margins-step"
        assert page.locator("#margins output").inner_text() == "step 20"
        page.uncheck("#reload-on")
        page.click("#tab-cost")
        page.reload()
        assert not page.is_checked("#reload-on")
        assert selected(page) == "Cost"
        written(path, a_run(tmp_path, "finished"))
        page.reload()
        assert page.locator("#reload").is_hidden()


def test_a_page_reloads_itself_while_the_run_goes_on(tmp_path: Path, browse: Browse) -> None:
    run, path = a_run(tmp_path, "running"), tmp_path / "run.html"
    soon = run_page([run], now=time.time()).replace('"refresh":15', '"refresh":1')
    path.write_text(soon.replace("<h1>", "<h1>first "))
    with browse(path) as page:
        (tmp_path / "next").write_text(soon.replace("<h1>", "<h1>second ").replace('"running":true', '"running":false'))
        os.replace(tmp_path / "next", path)
        page.locator("h1", has_text="second").wait_for()
        assert page.locator("#reload").is_hidden()  # it has ended


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_several_runs_are_side_by_side(scheme: str, tmp_path: Path, browse: Browse) -> None:
    runs = [a_run(tmp_path / name, "finished", name) for name in ("dpo", "ipo")]
    with browse(written(tmp_path / "report.html", *runs), color_scheme=scheme) as page:
        legend = page.locator("#panel-training .chart").first.locator(".u-legend").inner_text()
        assert re.findall(r"dpo|ipo", legend) == ["dpo", "ipo"]
        page.click("#tab-images")
        assert page.locator("#images figcaption").all_inner_texts() == ["dpo, step 30", "ipo, step 30"]
        page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")  # drawn again, in other colours
        page.click("#tab-training")
        assert page.locator("#panel-training .chart").first.locator("canvas").count() == 1
        page.click("#tab-settings")
        assert "None." in page.locator("#panel-settings").inner_text()


def test_an_empty_run_has_a_page(tmp_path: Path, browse: Browse) -> None:
    (tmp_path / "config.yaml").write_text("")
    run = read_run(tmp_path, {}, RunState("running"))
    with browse(written(tmp_path / "run.html", run)) as page:
        assert "No log line yet" in page.locator("#panel-training").inner_text()
        assert "no news for long" in page.locator("#ago").inner_text()
