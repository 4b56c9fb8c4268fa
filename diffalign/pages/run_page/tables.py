"""The parts of a run's page that are text: state, figures, health reports, settings, versions, what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffalign.pages.html import escape
from diffalign.pages.run_page.data import RunData, flattened
from diffalign.pages.run_page.figures import Change, Figures, Interval, duration, figures

STATES = {"running": "running", "finished": "finished", "ended": "ended early"}


def header(runs: Sequence[RunData], title: str, written: str) -> str:
    """The title, and the state of each run."""
    states = "".join(_state(run, named=len(runs) > 1) for run in runs)
    return (
        f'<header><h1>{escape(title)}</h1>{states}<p class="soft small">Written {escape(written)}<span id="ago"></span>'
        '<label id="reload" hidden> · <input type="checkbox" id="reload-on" checked> reload while it runs</label>'
        "</p></header>"
    )


def cards(run: RunData) -> str:
    """The figures of one run, as boxes."""
    return f'<dl class="cards">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in _rows(figures(run)))}</dl>'


def numbers(runs: Sequence[RunData]) -> str:
    """The figures of several runs, as a table with a column for each."""
    columns = [dict(_rows(figures(run))) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return _table(runs, {name: [column.get(name, "–") for column in columns] for name in names})


def health(runs: Sequence[RunData]) -> str:
    """What the rules reported."""
    blocks = []
    for run in runs:
        name = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        reports = figures(run).reports
        if reports:
            text = f"<ul>{''.join(f'<li>{escape(each)}</li>' for each in reports)}</ul>"
        elif (run.settings.get("health") or {}).get("action") == "none":
            text = "<p>The rules are off (<code>health.action: none</code>); <code>warn</code> turns them on.</p>"
        else:
            text = "<p>No rule has reported anything.</p>"
        blocks.append(name + text)
    return "".join(blocks)


def settings(runs: Sequence[RunData]) -> str:
    """The whole config of one run, or the settings in which several differ; then versions and device."""
    if len(runs) == 1:
        found = f'<h2>Settings</h2><p class="soft">config.yaml, defaults included</p>{_pre(runs[0].settings)}'
        return found + f"<h2>Versions and device</h2>{_pre(runs[0].facts) if runs[0].facts else '<p>No run.json.</p>'}"
    parts = [("Settings that differ", [flattened(run.settings) for run in runs])]
    parts.append(("Versions and device that differ", [flattened(run.facts) for run in runs]))
    whole = "".join(
        f"<details><summary>All settings of {escape(run.name)}</summary>{_pre(run.settings)}</details>" for run in runs
    )
    return "".join(f"<h2>{title}</h2>{_differences(trees, runs)}" for title, trees in parts) + whole


def missing(runs: Sequence[RunData], charts: set[str]) -> dict[str, list[str]]:
    """What a tab of the page lacks, with the key that turns it on; HTML, by tab. charts: the titles of those drawn."""
    found: dict[str, list[str]] = {"training": [], "heldout": [], "images": [], "cost": []}
    if not any(run.lines for run in runs):
        found["training"].append(
            "No log line yet: the first one comes after <code>training.logging_steps</code> steps."
        )
    elif "Policy error ÷ reference error" not in charts:
        found["training"].append("No errors against a reference: this objective evaluates none.")
    if not any(run.margins for run in runs):
        found["training"].append(
            "No histogram of margins: the objective has no logit, nothing is logged yet, or an earlier version of "
            "diffalign wrote the run."
        )
    if "Accuracy on held-out pairs" not in charts:
        found["heldout"].append(
            "No held-out pairs were measured. <code>validation.pairs</code> turns them on: a share of the pairs, or a "
            "path."
        )
    if not any(run.images for run in runs):
        found["images"].append(
            "No validation images. <code>validation.prompts</code> turns them on, <code>validation.every</code> says "
            "how often."
        )
    if not any(run.timing for run in runs):
        found["cost"].append("No times: nothing is logged yet, or an earlier version of diffalign wrote the run.")
    return found


def _rows(found: Figures) -> list[tuple[str, str]]:
    """Name and value of every figure that there is, as HTML."""
    rows: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("steps", found.step, lambda x: f"{x:,}" + (f" of {found.max_steps:,}" if found.max_steps else "")),
        ("loss", found.loss, _change),
        ("training accuracy", found.accuracy, _change),
        ("held-out accuracy", found.heldout, _interval),
        ("time", found.seconds, duration),
        ("time left", found.seconds_left, lambda x: f"about {duration(x)}"),
        ("pairs", found.pairs, lambda x: f"{x:,}"),
        ("pairs per second", found.pairs_per_second, lambda x: f"{x:.3g}"),
        ("UNet images", found.forwards, lambda x: f"{x:,}"),
        ("peak GPU memory", found.peak_memory, lambda x: f"{x / 2**30:.2f} GiB"),
        ("health reports", found.reports, lambda x: str(len(x))),
    ]
    return [(name, text(value)) for name, value, text in rows if value is not None]


def _change(found: Change) -> str:
    of = f"last {found.logs} logs" if found.logs > 1 else "last log"
    return f'{found.first:.4g} → {found.last:.4g} <span class="soft">{of}</span>'


def _interval(found: Interval) -> str:
    ends = "" if found.low is None or found.high is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return f'{found.first:.3g} → {found.last:.3g}{ends} <span class="soft">step {found.step}</span>'


def _state(run: RunData, named: bool) -> str:
    of = f" of {run.max_steps:,}" if run.max_steps else ""
    name = f"<strong>{escape(run.name)}</strong> " if named else ""
    kind = "soft" if run.state.kind == "finished" else "bad"
    detail = f'<br><span class="{kind}">{escape(run.state.detail)}</span>' if run.state.detail else ""
    pill = f'<span class="pill {run.state.kind}">{STATES[run.state.kind]}</span>'
    return f'<p class="state">{pill} {name}step {run.step:,}{of}{detail}</p>'


def _pre(tree: Mapping[str, Any]) -> str:
    return f"<pre>{escape(_yaml(tree))}</pre>"


def _yaml(tree: Mapping[str, Any], indent: str = "") -> str:
    """Nested values as indented text, values as JSON, which YAML reads alike."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}:", _yaml(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_value(value)}")
    return "\n".join(lines)


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


def _differences(trees: Sequence[Mapping[str, Any]], runs: Sequence[RunData]) -> str:
    keys = dict.fromkeys(key for tree in trees for key in tree)
    absent = object()
    differ = [key for key in keys if any(tree.get(key, absent) != trees[0].get(key, absent) for tree in trees[1:])]
    if not differ:
        return "<p>None.</p>"
    texts = {
        f"<code>{escape(key)}</code>": [escape(_value(tree[key])) if key in tree else "–" for tree in trees]
        for key in differ
    }
    return _table(runs, texts, "settings")


def _table(runs: Sequence[RunData], rows: Mapping[str, Sequence[str]], kind: str = "") -> str:
    """A column for each run, a row for each name; names and cells are HTML."""
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows.items()
    )
    table = f'<table class="{kind}"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'
