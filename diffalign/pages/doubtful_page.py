"""The page of doubtful pairs: both pictures of each, to be marked keep, swap or drop.

Marks are remembered by the browser, where it stores anything for files, and saved as `decisions.csv` with the
pairs to swap or drop, which `diffalign data relabel` reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.pages.html import ImageCoding, asset, escape, html_page, image_uri, save_page, shows_pixels

CODING = ImageCoding(side=320)
STYLE = """
.card[data-mark=swap], .card[data-mark=drop] { border-left: .3rem solid var(--bad); }
.card[data-mark=keep] { border-left: .3rem solid var(--good); }
.facts { margin: .5rem 0; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class DoubtfulPair:
    """A pair that a tuned model ranks against its label, or nearly so."""

    rank: int  # 1: the most doubtful
    id: str
    prompt: str
    chosen: Image.Image
    rejected: Image.Image
    margin: float  # of the tuned model; negative: it prefers the rejected image
    quarter: str = ""  # which quarter of t says so, as it is shown
    chosen_image: int = 0  # which of the stored images is the chosen one, 0 or 1


def write_doubtful_page(
    file: Path,
    pairs: Iterable[DoubtfulPair],
    *,
    title: str,
    note: str = "",
    next_command: str = "",
    coding: ImageCoding = CODING,
) -> None:
    """Writes the page of the pairs, in their order. title, note: plain text; next_command: what applies the saved
    decisions; coding: how pictures are stored.

    Raises DiffalignError where there is no pair, or two have one id.
    """
    rows, pixels = [], True
    for pair in pairs:
        pixels = pixels and shows_pixels(pair.chosen) and shows_pixels(pair.rejected)
        images = {side: image_uri(getattr(pair, side), coding) for side in ("chosen", "rejected")}
        rows.append(
            {"rank": pair.rank, "id": pair.id, "prompt": pair.prompt, "margin": pair.margin, "quarter": pair.quarter}
            | {"chosen_image": pair.chosen_image}
            | images
        )
    ids = [str(row["id"]) for row in rows]
    if not rows:
        raise DiffalignError("there is no doubtful pair; a page needs at least one")
    if len(set(ids)) < len(ids):
        double = next(one for one in ids if ids.count(one) > 1)
        raise DiffalignError(f"two doubtful pairs have the id {double!r}; marks need ids that differ")
    body = f"""
<h1>{escape(title)}</h1>
<p class="soft">{escape(note)}</p>
<p class="keys"><kbd>↓</kbd> <kbd>↑</kbd> next and previous pair · <kbd>k</kbd> keep · <kbd>s</kbd> swap the sides ·
<kbd>d</kbd> drop · <kbd>/</kbd> search</p>
<div class="tools" role="toolbar" aria-label="Tools">
<input id="search" type="search" placeholder="Search prompts" aria-label="Search prompts">
<div id="only" class="group"></div>
<button id="save" type="button">Save decisions.csv</button>
<span id="count" class="count" aria-live="polite"></span>
</div>
{f'<p class="soft small">Then: <code>{escape(next_command)}</code></p>' if next_command else ""}
<main id="cards" class="cards"></main>"""
    identity = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
    page = html_page(
        title,
        body,
        style=asset("cards.css") + STYLE,
        scripts=[asset("common.js"), asset("doubtful.js")],
        data={"doubtful": {"identity": identity, "pixels": pixels, "pairs": rows}},
    )
    save_page(file, page)
