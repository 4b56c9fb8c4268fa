"""The arena as one HTML page that needs no network: leaderboards, curves, images, configs."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

import yaml
from PIL import Image

from diffalign.arena.board import Row, interval
from diffalign.arena.entries import PREFERENCES
from diffalign.arena.jobs import FinishedJob
from diffalign.arena.plots import curves

SHOWN = 12  # images of each entry, of different prompts
SCALE = 4  # screen pixels to a pixel of the world

STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d8dce1; --good: #1b7f5c; --bad: #b3382c; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 2rem auto; max-width: 92rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.soft, td.soft, summary { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
tr.control td:first-child { font-style: italic; } td.good { color: var(--good); } td.bad { color: var(--bad); }
article { border-top: 1px solid var(--line); padding: .8rem 0; }
article h3 { margin: .2rem 0; font-size: 1.05rem; }
.strip { display: block; image-rendering: pixelated; margin: .3rem 0; }
svg { max-width: 100%; height: auto; }
.bar { display: block; width: 15rem; max-width: none; height: 1rem; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: 12.5px; line-height: 1.4; }
details > summary { cursor: pointer; }
"""


def page(found: dict[str, Any], strips: dict[str, str]) -> str:
    """The page of a record; `strips` are `image_strip` of the base and of each entry's first run, by name."""
    protocol, there = found["protocol"], found["environment"]
    prompts = len(protocol["prompts"])
    lead = (
        f"Every method tuned the same base on the same {protocol['pairs_per_step']} pairs a step. dR is the mean gain "
        f"in true reward over the base on {prompts} prompts of the split “{protocol['split']}” × "
        f"{protocol['pictures_per_prompt']} starting noises, paired; brackets are 95 % intervals over prompts and "
        "training runs. Learning rates were chosen on other prompts. A guard in words says what a gain was paid with."
    )
    first = found["views"][0]
    body = [
        "<h1>The arena</h1>",
        f"<p>{escape(lead)}</p>",
        f"<p class=soft>{escape(found['command'])} · commit {escape(str(there.get('git_commit')))}"
        f"{' with changes' if there.get('git_dirty') else ''} · "
        + escape(", ".join(f"{name} {version}" for name, version in there["versions"].items()))
        + f" · Python {escape(there['python'])}</p>",
        *(_board(view) for view in found["views"]),
        "<h2>Method by method</h2>",
        f"<p class=soft>Images: {SHOWN} prompts, the base above, the method below, from the same noise. Curves: the "
        "first training seed at equal steps. In the DPO family a policy equal to its reference has the loss ln 2, and "
        "a loss near it does not show what the images are like.</p>",
        *(_entry(row, first["preference"], strips) for row in first["rows"]),
    ]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>The arena</title>"
        "<meta name=viewport content='width=device-width'>"
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def image_strip(done: FinishedJob) -> str:
    """One image each of the first prompts, side by side, as a data URL; empty where a run made none."""
    firsts = {image.prompt: image for image in reversed(done.pictures)}
    shown = [firsts[prompt].open() for prompt in list(dict.fromkeys(p.prompt for p in done.pictures))[:SHOWN]]
    if not shown:
        return ""
    side = shown[0].width
    strip = Image.new("RGB", (len(shown) * (side + 1) - 1, shown[0].height), "white")
    for place, image in enumerate(shown):
        strip.paste(image, (place * (side + 1), 0))
    buffer = io.BytesIO()
    strip.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _board(view: dict[str, Any]) -> str:
    rows, preference = view["rows"], view["preference"]
    (other,) = (name for name in PREFERENCES if name != preference)
    limits = [limit for row in rows if not row["failed"] for limit in row["rewards"][preference]["gain"]]
    reach = max((abs(limit) for limit in limits), default=1.0) or 1.0
    head = (
        "",
        "dR",
        "",
        "win rate",
        "accuracy",
        "diversity",
        f"dR {other}",
        "guards",
        "steps",
        "UNet forwards",
        "CPU s",
    )
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = "\n".join(_line(row, preference, other, reach) for row in rows)
    return (
        f"<h2>{escape(view['preference'])}: {escape(view['budget'])}</h2>\n"
        f"<div class=scroll><table><thead><tr>{cells}</tr></thead><tbody>\n{lines}\n</tbody></table></div>{_kept(rows)}"
    )


def _kept(rows: list[Row]) -> str:
    """Which lines of a table are of an earlier arena, as a paragraph; nothing where all are of this one."""
    kept = [row for row in rows if row.get("kept")]
    if not kept:
        return ""
    names = ", ".join(row["name"] for row in kept)
    commits = ", ".join(sorted({commit[:7] for row in kept for commit in row["commits"]}))
    return (
        f"\n<p class=soft>Lines of an earlier arena (trained at {escape(commits)}), with the settings that its sweep "
        f"chose and the intervals that it computed: {escape(names)}.</p>"
    )


def _line(row: Row, preference: str, other: str, reach: float) -> str:
    kind = " class=control" if row["control"] else ""
    cost = "".join(
        f"<td>{round(sum(values) / len(values)):,}</td>"
        for values in (row["steps"], row["unet_forwards"], row["cpu_seconds"])
    )
    if row["failed"]:
        return (
            f"<tr{kind}><td>{escape(row['name'])}</td><td colspan=7 class=bad>{escape(row['failed'])}</td>{cost}</tr>"
        )
    mine = row["rewards"][preference]
    value, low, high = mine["gain"]
    tone = "good" if low > 0 else "bad" if high < 0 else "soft"
    return (
        f"<tr{kind}><td>{escape(row['name'])}</td><td class={tone}>{interval(mine['gain'], '+.3f')}</td>"
        f"<td>{_bar(value, low, high, reach)}</td><td>{interval(mine['win_rate'], '.2f')}</td>"
        f"<td>{interval(row['accuracy']['change'], '+.3f')}</td><td>{interval(row['diversity'], '.2f')}</td>"
        f"<td>{interval(row['rewards'][other]['gain'], '+.3f')}</td>"
        f"<td class=bad>{escape(', '.join(row['guards']))}</td>{cost}</tr>"
    )


def _bar(value: float, low: float, high: float, reach: float) -> str:
    """An interval drawn on an axis from -reach to +reach."""
    x, left, right = (120 + 115 * limit / reach for limit in (value, low, high))
    colour = "#1b7f5c" if low > 0 else "#b3382c" if high < 0 else "#6b7280"
    return (
        "<svg class=bar viewBox='0 0 240 16' role=img aria-label='interval'>"
        "<line x1=120 x2=120 y1=0 y2=16 stroke='#b6bcc4'/>"
        f"<line x1={left:.1f} x2={right:.1f} y1=8 y2=8 stroke='{colour}' stroke-width=5 opacity=.4 />"
        f"<circle cx={x:.1f} cy=8 r=4 fill='{colour}'/></svg>"
    )


def _entry(row: Row, preference: str, strips: dict[str, str]) -> str:
    shown = ""
    if strips.get(row["name"]):
        shown = "".join(_strip(strips[name], name) for name in ("base", row["name"]))
    gains = "" if row["failed"] else ", ".join(f"{value:+.3f}" for value in row["gain_by_run"][preference])
    said = escape(row["failed"]) if row["failed"] else f"dR by training seed: {gains}"
    config = escape(yaml.safe_dump(row["config"], sort_keys=False, allow_unicode=True))
    return (
        f"<article id='{escape(row['name'])}'><h3>{escape(row['name'])}</h3><p class=soft>{escape(row['paper'])}<br>"
        f"{said}</p>{shown}{curves(row)}<details><summary>config</summary><pre>{config}</pre></details></article>"
    )


def _strip(url: str, name: str) -> str:
    width = (SHOWN * 17 - 1) * SCALE
    return f"<img class=strip width={width} src='{url}' alt='images: {escape(name)}' title='{escape(name)}'>"
