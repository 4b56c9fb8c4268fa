"""Puts the page of one or several runs together: text, curves, images, in one file that needs no other.

Curves are drawn by uPlot (MIT, `pages/vendor/`), which is in the page.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.pages.html import ImageCoding, escape, html_page, image_uri
from diffalign.pages.run_page import tables
from diffalign.pages.run_page.charts import POINTS, chart_data, margin_data
from diffalign.pages.run_page.data import RunData

IMAGES = 24  # of all runs together: a page stays below a few megabytes
FEWEST = 6  # of each run
SIDE = 1600  # of a validation image in the page, at most
REFRESH = 15  # seconds between two reloads while a run goes on
VENDOR = Path(__file__).parents[1] / "vendor"
TABS = {
    "training": "Training",
    "heldout": "Held-out pairs",
    "images": "Images",
    "health": "Health",
    "settings": "Settings",
    "cost": "Cost",
    "other": "Other metrics",
}


def run_page(runs: Sequence[RunData], *, now: float) -> str:
    """The page of some runs as HTML. now: seconds since 1970, which the page names as its time."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    charts, margins = chart_data(runs), margin_data(runs)
    problems = [f"{run.name}: {text}" if len(runs) > 1 else text for run in runs for text in run.problems]
    images = image_data(runs, problems)
    panels = _panels(runs, charts, has_margins=bool(margins), has_images=bool(images))
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    body = [
        tables.header(runs, title, written),
        "".join(f'<p class="bad">{escape(text)}</p>' for text in problems),
        tables.cards(runs[0]) if len(runs) == 1 else tables.numbers(runs),
        _tabs(panels),
        f'<footer class="soft small"><p>diffalign. A curve has at most about {POINTS} points; of a longer one the '
        "extremes remain. Curves by uPlot (MIT).</p></footer>",
    ]
    data = {
        "chart-data": charts,
        "margin-data": margins,
        "image-data": images,
        "page-data": {
            "runs": [run.name for run in runs],
            "running": any(run.state.kind == "running" for run in runs),
            "written": round(now),
            "refresh": REFRESH,
            "pace": max((_pace(run) for run in runs), default=0),
        },
    }
    return html_page(f"{title} – diffalign", "\n".join(body), style=_style(), scripts=_scripts(), data=data)


def image_data(runs: Sequence[RunData], problems: list[str]) -> list[dict[str, Any]]:
    """Validation images of each run that has some, as data URIs; of many, steps at even distances."""
    found = []
    most = max(FEWEST, IMAGES // len(runs))
    for index, run in enumerate(runs):
        chosen, last = run.images, len(run.images) - 1
        if len(chosen) > most:
            chosen = [chosen[round(i * last / (most - 1))] for i in range(most)]
        steps, uris = [], []
        for step, path in chosen:
            try:
                facts = path.stat()
                uris.append(_uri(path, facts.st_mtime_ns, facts.st_size))
                steps.append(step)
            except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: PIL's, of a broken PNG
                problems.append(f"{path.name} cannot be read as an image ({type(error).__name__})")
        if steps:
            found.append({"run": index, "steps": steps, "of": len(run.images), "uris": uris})
    return found


@lru_cache(maxsize=2 * IMAGES)
def _uri(path: Path, modified: int, size: int) -> str:
    """A validation image in the page. It is encoded once as long as its file (time, size) stays the same."""
    with Image.open(path) as image:
        return image_uri(image, ImageCoding("webp", SIDE, 85))


def _pace(run: RunData) -> float:
    """Seconds between the last two logs."""
    return run.timing[-1]["seconds"] - run.timing[-2]["seconds"] if len(run.timing) > 1 else 0.0


def _panels(
    runs: Sequence[RunData], charts: Sequence[dict[str, Any]], *, has_margins: bool, has_images: bool
) -> dict[str, str]:
    """The content of each tab."""
    found = dict.fromkeys(TABS, "")
    for tab, texts in tables.missing(runs, {chart["title"] for chart in charts}).items():
        found[tab] = "".join(f'<p class="soft">{text}</p>' for text in texts)
    for tab in ("training", "heldout", "cost", "other"):
        if any(chart["tab"] == tab for chart in charts):
            found[tab] = f'<div class="charts" data-tab="{tab}"></div>{found[tab]}'
    if has_margins:
        found["training"] = f"{found['training']}{_SLIDER.format(id='margins', title='Margins of the training pairs')}"
    if has_images:
        found["images"] = _SLIDER.format(id="images", title="Validation images") + found["images"]
    found["health"] = tables.health(runs)
    found["settings"] = tables.settings(runs)
    if not found["other"]:
        del found["other"]
    return found


_SLIDER = """<section class="slider" id="{id}">
<h2>{title}</h2>
<div class="steps"><button type="button" data-move="-1" aria-label="Earlier">‹</button>
<input type="range" id="{id}-step" min="0" value="0" aria-label="{title}: step">
<button type="button" data-move="1" aria-label="Later">›</button>
<output for="{id}-step"></output></div>
<div class="shown"></div></section>"""


def _tabs(panels: dict[str, str]) -> str:
    """A list of tabs and their panels; without scripts all panels are shown."""
    buttons = "".join(
        f'<button type="button" role="tab" id="tab-{name}" aria-controls="panel-{name}" '
        f'title="key {number}">{TABS[name]}</button>'
        for number, name in enumerate(panels, 1)
    )
    sections = "".join(
        f'<section role="tabpanel" id="panel-{name}" aria-labelledby="tab-{name}">{content}</section>'
        for name, content in panels.items()
    )
    return f'<div role="tablist" aria-label="Parts of the page">{buttons}</div>{sections}'


@lru_cache(maxsize=1)
def _style() -> str:
    own = Path(__file__).with_name("page.css")
    return "".join(file.read_text(encoding="utf-8") for file in (VENDOR / "uPlot.min.css", own))


@lru_cache(maxsize=1)
def _scripts() -> tuple[str, str]:
    licence = (VENDOR / "uPlot.LICENSE").read_text(encoding="utf-8")
    uplot = (VENDOR / "uPlot.iife.min.js").read_text(encoding="utf-8")
    return f"/*\n{licence}\n*/\n{uplot}", Path(__file__).with_name("page.js").read_text(encoding="utf-8")
