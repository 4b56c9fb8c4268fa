"""The page of a comparison: the base's picture beside or below those of tuned models, with the scores of each.

Its reader searches prompts, filters by win, tie, loss and disagreement of scorers, and sorts by the difference of a
score. Outcomes are those of the table: a difference below the scorer's threshold is a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.io.progress import Progress
from diffalign.pages.html import ImageCoding, asset, escape, html_page, image_uri, save_page, shows_pixels


class Picture(Protocol):
    """An image on disk, opened when it is written; `GeneratedImage` of `diffalign.evaluation` is one."""

    @property
    def prompt(self) -> str: ...

    @property
    def seed(self) -> int: ...

    def open(self) -> Image.Image:
        """As RGB."""
        ...


@dataclass(frozen=True)
class Column:
    """The images of one model, or of one training run of it."""

    name: str
    images: Sequence[Picture]
    scores: Sequence[Sequence[float]]  # [scorer][image]


@dataclass(frozen=True)
class Gain:
    """A line of the table: a model against the base, by one scorer. Limits are NaN where there is no interval."""

    model: str
    scorer: str
    value: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Comparison:
    """What a page of a comparison shows."""

    columns: Sequence[Column]  # the base first; all have the same prompts and seeds in the same order
    scorers: Sequence[tuple[str, float]]  # name, and the |difference| below which an image is a tie
    gains: Sequence[Gain]
    title: str = "Base and tuned models"
    note: str = ""


def write_comparison_page(file: Path, comparison: Comparison, coding: ImageCoding) -> int:
    """Writes the page and returns its size in bytes.

    Raises DiffalignError where the columns do not have the same prompts and seeds.
    """
    base, *others = comparison.columns
    keys = [(image.prompt, image.seed) for image in base.images]
    for column in others:
        if [(image.prompt, image.seed) for image in column.images] != keys:
            raise DiffalignError(f"'{column.name}' has other prompts and seeds than '{base.name}'; compare the same")
    rows, pixels, side = [], True, 0
    for i, (prompt, seed) in enumerate(Progress(keys, desc=file.name, unit="row")):
        opened = [column.images[i].open() for column in comparison.columns]
        pixels = pixels and all(map(shows_pixels, opened))
        side = max(side, *(max(image.size) for image in opened))
        scores = [[column.scores[s][i] for column in comparison.columns] for s in range(len(comparison.scorers))]
        images = [image_uri(image, coding) for image in opened]
        rows.append({"prompt": prompt, "seed": str(seed), "images": images, "scores": scores})
    data = {
        "columns": [column.name for column in comparison.columns],
        "scorers": [{"name": name, "tie": tie, "places": _places(tie)} for name, tie in comparison.scorers],
        "pixels": pixels,
        "cell": min(224, max(144, 2 * side)),  # pixels of an image on the screen at first
        "rows": rows,
    }
    text = html_page(
        comparison.title,
        _body(comparison, len(keys)),
        style=asset("cards.css") + asset("comparison.css"),
        scripts=[asset("common.js"), asset("comparison.js")],
        data={"comparison": data},
    )
    return save_page(file, text)


def _body(comparison: Comparison, count: int) -> str:
    base, *others = (escape(column.name) for column in comparison.columns)
    return f"""
<h1>{escape(comparison.title)}</h1>
<p class="soft">{count} pictures of “{base}” and of {", ".join(f"“{name}”" for name in others)}, each pair from the same
prompt and starting noise. {escape(comparison.note)}</p>
{_table(comparison)}
<p class="keys"><kbd>↓</kbd> <kbd>↑</kbd> next and previous · <kbd>v</kbd> side by side or wipe · <kbd>←</kbd>
<kbd>→</kbd> move the wipe · <kbd>Enter</kbd> large · <kbd>1</kbd>–<kbd>{5 if len(comparison.scorers) > 1 else 4}</kbd>
filter · <kbd>/</kbd> search</p>
<div class="tools" role="toolbar" aria-label="Tools">
<input id="search" type="search" placeholder="Search prompts" aria-label="Search prompts">
<div id="view" class="group"></div>
<div id="outcome" class="group" aria-label="Outcome"></div>
<div class="group"><label>Outcome of <select id="column"></select></label>
<label>by <select id="scorer"></select></label></div>
<label>Order <select id="sort"><option value="made">as generated</option><option value="gain">largest gain</option>
<option value="loss">largest loss</option><option value="prompt">prompt</option></select></label>
<label>Size <input id="size" type="range" min="96" max="512" step="16"></label>
<div id="columns" class="group"></div>
<span id="count" class="count" aria-live="polite"></span>
</div>
<main id="cards" class="cards"></main>
<dialog id="large" aria-labelledby="large-title"><header><div><h2 id="large-title"></h2>
<span id="large-seed" class="soft small"></span></div><div class="group">
<button id="before" type="button" title="previous (↑)">↑</button>
<button id="next" type="button" title="next (↓)">↓</button>
<button id="close" type="button" title="close (Esc)">×</button></div></header><div id="large-view"></div></dialog>
<noscript><p>This page needs JavaScript; it loads nothing from a network.</p></noscript>"""


def _places(tie: float) -> int:
    """Decimal places of a scorer's values, as in the printed table."""
    return 4 if tie < 0.001 else 3


def _table(comparison: Comparison) -> str:
    """Gain, interval and counts of every model and scorer."""
    places = {name: _places(tie) for name, tie in comparison.scorers}

    def line(gain: Gain) -> str:
        digits = f"+.{places[gain.scorer]}f"
        tone = "good" if gain.low > 0 else "bad" if gain.high < 0 else "soft"
        span = "no interval" if gain.low != gain.low else f"{gain.low:{digits}} to {gain.high:{digits}}"
        names = f"<td>{escape(gain.model)}</td><td>{escape(gain.scorer)}</td>"
        figures = f'<td class="{tone}">{gain.value:{digits}}</td><td>{span}</td>'.replace("-", "−")
        return f"<tr>{names}{figures}<td>{gain.wins}</td><td>{gain.ties}</td><td>{gain.losses}</td></tr>"

    titles = ("model", "scorer", "mean gain", "95 % interval", "wins", "ties", "losses")
    head = f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"
    return f'<div class="scroll"><table class="gains">{head}{"".join(map(line, comparison.gains))}</table></div>'
