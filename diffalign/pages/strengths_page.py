"""The gallery: pictures of tuned models at several strengths, through which a slider moves.

Strength s means base + s · (tuned − base), for a LoRA the factor of its update. Every picture was generated at its
strength; none is a blend of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.errors import DiffalignError
from diffalign.io.progress import Progress
from diffalign.pages.comparison_page import Column, Picture
from diffalign.pages.html import ImageCoding, asset, escape, html_page, image_uri, save_page, shows_pixels


@dataclass(frozen=True)
class Strengths:
    """What a gallery shows. All columns have the same prompts and seeds in the same order."""

    base: Column
    strengths: Sequence[float]  # ascending
    models: Sequence[tuple[str, Sequence[Column]]]  # name, and its images at each strength
    scorers: Sequence[tuple[str, int]] = ()  # name, and decimal places of its scores
    title: str = "Tuned models by strength"
    note: str = ""


def write_strengths_page(file: Path, gallery: Strengths, coding: ImageCoding) -> int:
    """Writes the page and returns its size in bytes. An image that stands in several places is stored once.

    Raises DiffalignError for strengths that do not ascend, and for columns that do not belong together.
    """
    if not gallery.models or list(gallery.strengths) != sorted(set(gallery.strengths)):
        raise DiffalignError(f"{len(gallery.models)} models at {list(gallery.strengths)}; give ascending strengths")
    keys = [(image.prompt, image.seed) for image in gallery.base.images]
    for name, columns in gallery.models:
        if len(columns) != len(gallery.strengths) or any(
            [(image.prompt, image.seed) for image in column.images] != keys for column in columns
        ):
            raise DiffalignError(f"'{name}' needs an image of the base's prompts and seeds at every strength")
    store = _Store(coding)
    rows = [
        {
            "prompt": prompt,
            "seed": str(seed),
            "base": store.add(gallery.base.images[i]),
            "baseScores": [scores[i] for scores in gallery.base.scores],
            "cells": [[store.add(column.images[i]) for column in columns] for _, columns in gallery.models],
            "scores": [[[s[i] for s in column.scores] for column in columns] for _, columns in gallery.models],
        }
        for i, (prompt, seed) in enumerate(Progress(keys, desc=file.name, unit="prompt"))
    ]
    data = {
        "models": [name for name, _ in gallery.models],
        "strengths": list(gallery.strengths),
        "scorers": [{"name": name, "places": places} for name, places in gallery.scorers],
        "images": list(store.places),
        "pixels": store.pixels,
        "rows": rows,
    }
    text = html_page(
        gallery.title,
        _body(gallery, len(keys)),
        style=asset("cards.css") + asset("strengths.css"),
        scripts=[asset("common.js"), asset("strengths.js")],
        data={"strengths": data},
    )
    return save_page(file, text)


class _Store:
    """Images by their data URI, each once."""

    def __init__(self, coding: ImageCoding) -> None:
        self.coding, self.places, self.pixels = coding, dict[str, int](), True

    def add(self, image: Picture) -> int:
        """The place of an image among those that are stored."""
        opened = image.open()
        self.pixels = self.pixels and shows_pixels(opened)
        return self.places.setdefault(image_uri(opened, self.coding), len(self.places))


def _body(gallery: Strengths, count: int) -> str:
    names = ", ".join(f"“{escape(name)}”" for name, _ in gallery.models)
    return f"""
<h1>{escape(gallery.title)}</h1>
<p class="soft">{count} prompts and seeds; the base and {names}, each from the same starting noise, at
{len(gallery.strengths)} strengths of the tuned weights: 0 is the base, 1 the weights as they were tuned. Every picture
was generated at its strength. {escape(gallery.note)}</p>
<p class="keys"><kbd>←</kbd> <kbd>→</kbd> strength · <kbd>v</kbd> models, wipe, all strengths · <kbd>1</kbd>–
<kbd>9</kbd> model of “all strengths” · <kbd>↓</kbd> <kbd>↑</kbd> next and previous prompt</p>
<div class="tools" role="toolbar" aria-label="Tools">
<div class="strength"><label for="strength">Strength</label><input id="strength" type="range" min="0" step="1">
<output id="value" for="strength"></output><div id="ticks" class="ticks" aria-hidden="true"></div></div>
<button id="play" type="button" aria-pressed="false">Play</button>
<div id="view" class="group"></div>
<div id="model" class="group" aria-label="Model"></div>
<label>Size <input id="size" type="range" min="64" max="512" step="16" value="128"></label>
<details class="each"><summary class="small">a strength for each model</summary><div id="each"></div></details>
</div>
<main id="cards" class="cards"></main>
{_means(gallery)}
<noscript><p>This page needs JavaScript; it loads nothing from a network.</p></noscript>"""


def _means(gallery: Strengths) -> str:
    """For each scorer the mean score of every model at every strength."""
    tables = []
    head = "".join(f"<th>{strength:g}</th>".replace("-", "−") for strength in gallery.strengths)
    for s, (scorer, places) in enumerate(gallery.scorers):
        lines = []
        for m, (name, columns) in enumerate(gallery.models):
            means = [sum(column.scores[s]) / len(column.scores[s]) for column in columns]
            cells = "".join(
                f'<td data-model="{m}" data-at="{at}">{f"{mean:.{places}f}".replace("-", "−")}</td>'
                for at, mean in enumerate(means)
            )
            lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
        caption = f"<caption>Mean {escape(scorer)} by strength</caption>"
        tables.append(f'<table class="means">{caption}<tr><th></th>{head}</tr>{"".join(lines)}</table>')
    return f'<div class="figures">{"".join(f"<div class=scroll>{table}</div>" for table in tables)}</div>'
