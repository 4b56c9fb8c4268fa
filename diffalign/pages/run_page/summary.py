"""What is printed at the end of a run: what happened, in a few lines that fit 80 columns."""

from __future__ import annotations

from pathlib import Path

from diffalign.pages.run_page.data import RunData
from diffalign.pages.run_page.figures import Change, Figures, duration, figures

WIDTH = 80
REPORTS = 1  # of the health rules that is shown


def summary(run: RunData, page: Path) -> str:
    """The lines. page: the page of the run, which the last line names where it is there."""
    found = figures(run)
    rows = [
        ("steps", _steps(found)),
        ("pairs", _pairs(found)),
        ("loss", _change(found.loss)),
        ("accuracy", _change(found.accuracy) and f"{_change(found.accuracy)} (training)"),
        ("held-out", _heldout(found)),
        (
            "health",
            f"{len(found.reports)} report{'s' * (len(found.reports) > 1)} (health.jsonl)"
            if found.reports
            else "no report",
        ),
        *(("", text) for text in found.reports[:REPORTS]),
        ("page", str(page) if page.is_file() else ""),
    ]
    return "\n".join(
        _cut(f"{name:>10}  {text}") if name != "page" else f"{name:>10}  {text}" for name, text in rows if text
    )


def _steps(found: Figures) -> str:
    of = f" of {found.max_steps:,}" if found.max_steps and found.max_steps != found.step else ""
    return f"{found.step:,}{of}{f' in {duration(found.seconds)}' if found.seconds is not None else ''}"


def _pairs(found: Figures) -> str:
    parts = [] if found.pairs is None else [f"{found.pairs:,}"]
    parts += [] if found.pairs_per_second is None else [f"{found.pairs_per_second:.3g} per second"]
    parts += [] if found.forwards is None else [f"{found.forwards:,} images through the UNets"]
    return ", ".join(parts)


def _change(found: Change | None) -> str:
    if found is None:
        return ""
    last = f"over the last {found.logs} logs" if found.logs > 1 else "at the last log"
    return f"{found.first:.4f} at the first log, {found.last:.4f} {last}"


def _heldout(found: Figures) -> str:
    accuracy = found.heldout
    if accuracy is None:
        return ""
    ends = "" if accuracy.low is None or accuracy.high is None else f" [{accuracy.low:.3f}, {accuracy.high:.3f}]"
    return f"accuracy {accuracy.first:.3f} at first, {accuracy.last:.3f}{ends} at step {accuracy.step}"


def _cut(line: str) -> str:
    """A line of at most `WIDTH` columns; health.jsonl and the page have the whole text."""
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
