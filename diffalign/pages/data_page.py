"""`report.html` of a data set: what `diffalign data check` finds, drawn, with the pairs worth looking at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from diffalign.data.buckets.sizes import lost, square
from diffalign.data.heldout import prompt_key
from diffalign.data.row import ImageError
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.report import Report, spread, without
from diffalign.pages.html import ImageCoding, escape, html_page, image_uri, save_page, shows_pixels

CODING = ImageCoding(side=192)
BINS = 24  # of a histogram
SOME = 6  # pairs of each kind that is shown
STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.chart svg { width: 100%; height: 9rem; display: block; }
.chart rect { fill: var(--series-1); }
.ends { display: flex; justify-content: space-between; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
.pair figure { margin: 0; }
.pair .both { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; align-items: start; }
.pair img { width: 100%; border-radius: .3rem; }
td.reason, th.reason { white-space: normal; text-align: left; }
"""


def write_data_page(file: Path, report: Report, others: Sequence[Report] = (), samples: int = 12) -> int:
    """Writes the page of a data set; returns its size in bytes.

    others: data sets that should share nothing with it, such as a test set. samples: pairs of the contact sheet.
    """
    table = report.table
    title = f"{Path(report.path).name}: {report.usable} pairs"
    parts = [f"<h1>{escape(title)}</h1>", f"<pre>{escape(report.text())}</pre>", _problems(report)]
    gaps = _score_gaps(table)
    charts = [_aspects(report), _sides(report), _buckets(report), _gaps(gaps), _lengths(table)]
    parts.append(f'<h2>Distributions</h2><div class="charts">{"".join(filter(None, charts))}</div>')
    parts += [_shared(report, other) for other in others]
    parts.append(_pairs(table, "A sample", spread(len(table), samples), lambda i: ""))
    parts += _worst(report, gaps)
    return save_page(file, html_page(title, "\n".join(filter(None, parts)), style=STYLE))


def _problems(report: Report) -> str:
    rows = []
    for kind, found in report.by_kind.items():
        first = [escape(f"{each.where}: {without(each.where, each.reason)}") for each in found[:SOME]]
        name = kind if found[0].dropped else f"{kind} (still a pair)"
        rows.append(
            f'<tr><td>{escape(name)}</td><td>{len(found)}</td><td class="reason">{"<br>".join(first)}</td></tr>'
        )
    if not rows:
        return "<h2>Rows with a fault</h2><p>None.</p>"
    head = '<tr><th>fault</th><th>rows</th><th class="reason">the first of them</th></tr>'
    return f'<h2>Rows with a fault</h2><div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _aspects(report: Report) -> str:
    return _histogram(
        "Width ÷ height of the images (logarithmic)",
        [math.log2(width / height) for width, height in report.sizes],
        lambda x: f"{2**x:.2f}",
    )


def _sides(report: Report) -> str:
    below = "" if report.smaller is None else f"; {report.smaller} are below {report.resolution} pixels and enlarged"
    return _histogram(
        f"Shorter side in pixels{below}", [float(min(size)) for size in report.sizes], lambda x: f"{x:.0f}"
    )


def _gaps(of_pairs: Mapping[int, float]) -> str:
    gaps = list(of_pairs.values())
    against = sum(gap < 0 for gap in gaps)
    title = f"Score of the chosen image − score of the rejected one; {against} of {len(gaps)} contradict the label"
    return _histogram(title, gaps, lambda x: f"{x:.3g}")


def _lengths(table: PairTable) -> str:
    counts = Counter(map(prompt_key, table.prompts))
    most = counts.most_common(1)[0][1] if counts else 0
    title = f"Characters of the prompts; {len(counts)} different ones, one of them in {most} pairs"
    return _histogram(title, [float(len(prompt)) for prompt in table.prompts], lambda x: f"{x:.0f}")


def _buckets(report: Report) -> str:
    if report.buckets is None or report.cropped is None:
        return ""
    counts = report.buckets.counts
    title = f"Pairs in aspect buckets; cropped {report.cropped['aspect_buckets']:.1%}, of squares "
    title += f"{report.cropped['square']:.1%}"
    labels = [f"{width}x{height}" for (width, height), _ in counts]
    return _bars(title, [n for _, n in counts], labels, (labels[0], labels[-1]))


def _histogram(title: str, values: Sequence[float], shown: Callable[[float], str]) -> str:
    """Counts of values in equal bins between the smallest and the largest; nothing without values."""
    if not values:
        return ""
    low, high = min(values), max(values)
    width = (high - low) / BINS or 1.0
    counts = [0] * (BINS if high > low else 1)
    for value in values:
        counts[min(len(counts) - 1, int((value - low) / width))] += 1
    labels = [f"{shown(low + i * width)} to {shown(min(high, low + (i + 1) * width))}" for i in range(len(counts))]
    return _bars(title, counts, labels, (shown(low), shown(high)))


def _bars(title: str, counts: Sequence[int], labels: Sequence[str], ends: tuple[str, str]) -> str:
    wide, most = 100 / len(counts), max(counts)
    bars = "".join(
        f'<rect x="{i * wide:.3f}" y="{100 - 100 * n / most:.3f}" width="{wide * 0.9:.3f}" '
        f'height="{100 * n / most:.3f}"><title>{escape(label)}: {n}</title></rect>'
        for i, (n, label) in enumerate(zip(counts, labels, strict=True))
        if n
    )
    picture = (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">{bars}</svg>'
    )
    between = f'<div class="ends soft small"><span>{escape(ends[0])}</span><span>{escape(ends[1])}</span></div>'
    return f'<div class="panel chart"><h3>{escape(title)}</h3>{picture}{between}</div>'


def _shared(report: Report, other: Report) -> str:
    """How many pairs and prompts two data sets share, without reading an image."""
    ids, prompts = set(other.table.ids), set(map(prompt_key, other.table.prompts))
    pairs = [report.table.where(i) for i, id in enumerate(report.table.ids) if id in ids]
    of_prompt = sum(prompt_key(prompt) in prompts for prompt in report.table.prompts)
    first = f" (first: {escape(', '.join(pairs[:SOME]))})" if pairs else ""
    return (
        f"<h2>Shared with {escape(other.path)}</h2><p>{len(pairs)} pairs{first}; {of_prompt} of {report.usable} pairs "
        "have a prompt of it. <code>diffalign data dedupe --against</code> also finds images of equal bytes.</p>"
    )


def _worst(report: Report, gap: Mapping[int, float]) -> list[str]:
    """Pairs that deserve a look: the most cropped, the smallest, and those whose scores contradict their label."""
    table, found = report.table, []
    sizes = table.sizes
    both = {i: (sizes[2 * i], sizes[2 * i + 1]) for i in range(len(sizes) // 2)}
    if both:
        shapes = report.buckets or square(1)
        crop = {i: max(lost(size, shapes[i]) for size in pair) for i, pair in both.items()}
        worst = [i for i in sorted(crop, key=lambda i: (-crop[i], i))[:SOME] if crop[i] > 0]
        found.append(_pairs(table, "Cropped most", worst, lambda i: f"{crop[i]:.0%} of an image is cropped"))
        side = {i: min(min(size) for size in pair) for i, pair in both.items()}
        small = sorted(side, key=lambda i: (side[i], i))[:SOME] if len(set(side.values())) > 1 else []
        found.append(_pairs(table, "Smallest", small, lambda i: f"{side[i]} pixels wide or high"))
    against = [i for i in sorted(gap, key=lambda i: (gap[i], i))[:SOME] if gap[i] < 0]
    found.append(_pairs(table, "Scores against the label", against, lambda i: f"chosen − rejected: {gap[i]:.3g}"))
    return found


def _score_gaps(table: PairTable) -> dict[int, float]:
    """Score of the chosen image minus that of the rejected one, of the pairs that have both; ties have no order."""
    scored = {i: table.scores(i) for i in range(len(table)) if not table.tie(i)}
    gaps = {i: pair[0] - pair[1] for i, pair in scored.items() if pair is not None}
    return {i: gap for i, gap in gaps.items() if math.isfinite(gap)}


def _pairs(table: PairTable, title: str, places: Sequence[int], note: Callable[[int], str]) -> str:
    """Some pairs with their images, chosen left; nothing where there are none."""
    if not places:
        return ""
    shown = "".join(_pair(table, index, note(index)) for index in places)
    head = f'<h2>{escape(title)}</h2><p class="soft small">Chosen left, rejected right.</p>'
    return f'{head}<div class="pairs">{shown}</div>'


def _pair(table: PairTable, index: int, note: str) -> str:
    about = " · ".join(filter(None, (table.where(index), note)))
    try:
        row = table[index]
        images = "".join(_image(ref.open(), side) for side, ref in (("chosen", row.chosen), ("rejected", row.rejected)))
    except ImageError as error:
        images = f'<p class="bad small">{escape(error)}</p>'
    caption = f'{escape(table.prompts[index])}<br><span class="soft small">{escape(about)}</span>'
    figure = f'<figure><div class="both">{images}</div><figcaption>{caption}</figcaption></figure>'
    return f'<div class="panel pair">{figure}</div>'


def _image(image: Image.Image, side: str) -> str:
    pixels = ' class="pixels"' if shows_pixels(image) else ""
    return f'<img src="{image_uri(image, CODING)}" alt="{side}"{pixels}>'
