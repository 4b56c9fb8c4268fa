"""Our figures beside the published ones: one line for each model, scorer and source, each with its protocol.

A gain is a method's mean minus its base's mean of the same source, so that what differs between protocols (prompts,
steps, guidance) mostly cancels. Ours has its interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffalign.evaluation.published.catalogue import MEASURED_BY, Catalogue
from diffalign.evaluation.report import BASE, Result, aligned
from diffalign.evaluation.stats import Estimate, Paired

OURS = "ours"


@dataclass(frozen=True)
class FigureLine:
    """One model by one scorer and one source, in the source's unit."""

    metric: str
    model: str
    source: str  # OURS, or the title of a table
    mean: float
    gain: float | None  # over the base of the same source; None: of the base, or where the source has no base
    interval: tuple[float, float] | None  # 95 %, of our gain
    protocol: str


def lines_beside(result: Result, base: str, protocol: str, known: Catalogue) -> list[FigureLine]:
    """Our and the published lines of every model of `result`, for each metric that one of its scorers measures.

    base: a key of `known.bases`. protocol: how our images were made.
    """
    lines: list[FigureLine] = []
    for scorer in result.models[0].scores:
        metrics = [metric for metric, (name, _) in MEASURED_BY.items() if name == scorer]
        if not metrics:
            continue
        factor = MEASURED_BY[metrics[0]][1]
        own = {model.name: model.scores[scorer] for model in result.models}
        for model in (BASE, *own):
            lines.append(_ours(metrics[0], model, own, factor, protocol))
            lines += _published(metrics, model, base, known)
    return lines


def _ours(metric: str, model: str, own: Mapping[str, Paired], factor: float, protocol: str) -> FigureLine:
    if model == BASE:
        return FigureLine(metric, model, OURS, factor * next(iter(own.values())).base, None, None, protocol)
    found: Estimate = own[model].gain
    interval = None if math.isnan(found.low) else (factor * found.low, factor * found.high)
    return FigureLine(metric, model, OURS, factor * own[model].tuned, factor * found.value, interval, protocol)


def _published(metrics: Sequence[str], model: str, base: str, known: Catalogue) -> list[FigureLine]:
    lines = []
    for table in known.tables:
        figures = table.figures.get(base, {})
        for column, metric in enumerate(table.metrics):
            if metric in metrics and model in figures:
                mean = figures[model][column]
                gain = mean - figures[BASE][column] if BASE in figures and model != BASE else None
                protocol = f"{table.protocol}; column {metric}" if metric != metrics[0] else table.protocol
                lines.append(FigureLine(metrics[0], model, table.title, mean, gain, None, protocol))
    return lines


def verdicts(lines: Sequence[FigureLine], base: str, known: Catalogue) -> list[str]:
    """Whether our base, and our gain of the method that the band is of, are where published ones are."""
    band, found = known.band, []
    for line in lines:
        if line.source != OURS or line.metric != band.metric or line.model not in (BASE, band.method):
            continue
        value, (low, high) = (line.mean, band.base[base]) if line.gain is None else (line.gain, band.gain[base])
        what = "mean of the base" if line.gain is None else f"gain of {line.model}"
        where = "within" if low <= value <= high else "outside"
        found.append(
            f"{band.metric}, {what}: {value:.3f} is {where} the published {low:g} to {high:g} of 500 Pick-a-Pic prompts"
        )
    return found


def as_table(lines: Sequence[FigureLine]) -> str:
    """The lines as text, one block for each metric; protocols are numbered below."""
    protocols = list(dict.fromkeys(line.protocol for line in lines))
    blocks = []
    for metric in dict.fromkeys(line.metric for line in lines):
        rows = [["model", "source", "mean", "over its base", "protocol"]]
        for line in lines:
            if line.metric == metric:
                number = f"[{protocols.index(line.protocol) + 1}]"
                rows.append([line.model, line.source, f"{line.mean:.3f}", _gain(line), number])
        blocks.append("\n".join([metric, *aligned(rows)]))
    notes = [f"[{i}] {protocol}" for i, protocol in enumerate(protocols, start=1)]
    return "\n\n".join([*blocks, "\n".join(["protocols", *notes])])


def as_markdown(lines: Sequence[FigureLine]) -> str:
    """The lines as one Markdown table for each metric."""
    blocks = []
    for metric in dict.fromkeys(line.metric for line in lines):
        rows = [
            [line.model, line.source, f"{line.mean:.3f}", _gain(line), line.protocol]
            for line in lines
            if line.metric == metric
        ]
        head = ["model", "source", "mean", "over its base", "protocol"]
        blocks.append(f"## {metric}\n\n{markdown_table(head, rows)}")
    return "\n\n".join(blocks)


def as_json(lines: Sequence[FigureLine]) -> list[dict[str, Any]]:
    """The lines as they are stored."""
    return [asdict(line) for line in lines]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of GitHub's Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *escaped))


def _gain(line: FigureLine) -> str:
    if line.gain is None:
        return "-"
    if line.interval is None:
        return f"{line.gain:+z.3f}"
    return f"{line.gain:+z.3f} [{line.interval[0]:+z.3f}, {line.interval[1]:+z.3f}]"
