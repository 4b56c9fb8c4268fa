"""What `diffalign train` prints at the end of a run: what happened, in a few lines that fit 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffalign.config.schema import AnyConfig
    from diffalign.pages.run_page.data import RunData
    from diffalign.pages.run_page.figures import Change, Figures

WIDTH = 80
REPORTS = 1  # of the health rules that is shown


def finished_run(config: AnyConfig) -> RunData:
    """What the run of a config has written."""
    from pathlib import Path

    from diffalign.pages.run_page.data import RunState, read_run

    return read_run(Path(config.output_dir), config.resolved(), RunState("finished"))


def summary(run: RunData) -> str:
    """The lines."""
    from diffalign.pages.run_page.figures import figures
    from diffalign.training.metrics import RUN_PAGE

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
        ("page", str(run.folder / RUN_PAGE) if (run.folder / RUN_PAGE).is_file() else ""),
    ]
    return "\n".join(
        _cut(f"{name:>10}  {text}") if name != "page" else f"{name:>10}  {text}" for name, text in rows if text
    )


def _steps(found: Figures) -> str:
    from diffalign.pages.run_page.figures import duration

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
