"""The charts of a run's page, as data for its script: which metrics are drawn together, and what a line in them means.

Every metric of a run is drawn: those that no chart names have one of their own. A curve of more than
`POINTS` points is thinned so that its extremes remain (`data.thinned`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diffalign.pages.run_page.data import RunData, thinned

POINTS = 500  # of a curve
HISTOGRAMS = 120  # of margins, spread over the run
DIGITS = 5  # significant ones
QUARTERS = ("q1", "q2", "q3", "q4")
Curve = tuple[list[int], list[float | None]]


@dataclass(frozen=True)
class Chart:
    """Metrics that are drawn together."""

    tab: Literal["training", "heldout", "other"]
    title: str
    help: str
    metrics: Mapping[str, str]  # label -> metric
    level: tuple[str, float] | None = None  # a horizontal line: its label and place
    start: bool = False  # draw the loss at which policy and reference are equal
    ratio_to: Mapping[str, str] = field(default_factory=dict)  # label -> the metric that the first is divided by
    band: bool = False  # the first metric, NAME, has an interval NAME/low, NAME/high, and is drawn or nothing is


def _quarters(name: str) -> dict[str, str]:
    return {q: f"{name}/{q}" for q in QUARTERS}


TRAINING = (
    Chart("training", "Loss", "Mean over the pairs since the last log.", {"loss": "loss"}, start=True),
    Chart(
        "training",
        "Accuracy on training pairs",
        "Share of pairs whose chosen image the policy prefers. ½ is chance.",
        {"implicit accuracy": "implicit_acc", "accuracy": "accuracy"},
        level=("chance", 0.5),
    ),
    Chart(
        "training",
        "Implicit rewards",
        "How much likelier an image is under the policy than under the reference. Both below 0: the policy becomes "
        "worse at both.",
        {"chosen": "rewards/chosen", "rejected": "rewards/rejected"},
        level=("reference", 0.0),
    ),
    Chart(
        "training",
        "Mean margin",
        "Reward of the chosen image minus that of the rejected one.",
        {"margin": "rewards/margins"},
        level=("no preference", 0.0),
    ),
    Chart(
        "training",
        "Policy error ÷ reference error",
        "By quarter of the timesteps; q1 has the least noise. Above 1 the policy denoises worse than the reference.",
        _quarters("error/policy"),
        level=("equal", 1.0),
        ratio_to=_quarters("error/reference"),
    ),
    Chart(
        "training",
        "Policy error",
        "Mean squared error of the prediction by quarter of the timesteps.",
        _quarters("error/policy"),
    ),
    Chart("training", "Gradient norm", "Before clipping.", {"gradient norm": "grad_norm"}),
    Chart("training", "Learning rate", "In force, after warm-up.", {"learning rate": "lr"}),
    Chart(
        "training",
        "Gradient factor, saturation, displacement",
        "gradient factor: mean of σ(−h), which weighs a pair's gradient. saturated: share of logits beyond ±4. "
        "displacement: share of chosen images that became less likely than under the reference.",
        {"gradient factor": "gradient_factor", "saturated": "saturated", "displacement": "displacement"},
    ),
    Chart("training", "Size of the logit", "Mean of |h|. Near 0 nothing moves.", {"|h|": "logit/abs"}),
)
HELD_OUT = (
    Chart(
        "heldout",
        "Accuracy on held-out pairs",
        "The band is the 95 % interval, clustered by prompt. Training rises and held-out does not: overfitting.",
        {"held-out": "heldout/accuracy", "training pairs": "implicit_acc"},
        level=("chance", 0.5),
        band=True,
    ),
    Chart(
        "heldout",
        "Margin on held-out pairs",
        "Band: 95 % interval.",
        {"held-out": "heldout/margin"},
        level=("no preference", 0.0),
        band=True,
    ),
    Chart(
        "heldout",
        "Score on held-out pairs",
        "Mean of tanh(margin / its size at that point): what early stopping and the best weights go by, if "
        "nothing else is set. Band: 95 % interval.",
        {"held-out": "heldout/score"},
        level=("no preference", 0.0),
        band=True,
    ),
    Chart(
        "heldout",
        "Loss on held-out pairs",
        "Band: 95 % interval.",
        {"held-out": "heldout/loss"},
        start=True,
        band=True,
    ),
    Chart(
        "heldout",
        "Diversity of images",
        "Mean distance of two images of one prompt, over that at the start. Band: 95 % interval.",
        {"diversity": "heldout/diversity"},
        level=("start", 1.0),
        band=True,
    ),
    Chart(
        "heldout",
        "Faithfulness of images",
        "Mean score of validation.faithfulness, less that at the start. Band: 95 % interval.",
        {"change": "heldout/faithfulness"},
        level=("start", 0.0),
        band=True,
    ),
    *(
        Chart(
            "heldout",
            f"Held-out {what} by quarter of the timesteps",
            "q1 has the least noise.",
            _quarters(f"heldout/{what}"),
            level=level,
        )
        for what, level in (("accuracy", ("chance", 0.5)), ("margin", ("no preference", 0.0)), ("loss", None))
    ),
)
NOT_ALONE = {f"error/reference/{q}" for q in QUARTERS} | {"unet_forwards"}  # drawn as ratios, and as cost


def chart_data(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """All charts that have any point, as plain values for the page's script."""
    named = {metric for chart in (*TRAINING, *HELD_OUT) for metric in chart.metrics.values()}
    named |= {f"{metric}/{end}" for metric in named for end in ("low", "high")} | NOT_ALONE
    rest = sorted({name for run in runs for name in run.metrics} - named)
    others = [Chart("other", name, "", {name: name}) for name in rest]
    found = [_drawn(chart, runs) for chart in (*TRAINING, *HELD_OUT, *others)]
    return [chart for chart in (*found, *_cost(runs)) if chart["tables"]]


def margin_data(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Histograms of margins of each run that has them: steps, and shares of the pairs since the log before."""
    found = []
    for index, run in enumerate(runs):
        if run.margins:
            last = len(run.margins) - 1
            number = min(HISTOGRAMS, len(run.margins))
            chosen = [run.margins[round(i * last / max(1, number - 1))] for i in range(number)]
            counts = [line["counts"] for line in chosen]
            found.append({"run": index, "steps": [int(x["step"]) for x in chosen], "counts": counts,
                          "width": run.margins[-1].get("width", 0.25)})  # fmt: skip
    return found


def rates(run: RunData) -> Curve:
    """Pairs per second between two logs."""
    steps, values = [], []
    for before, line in zip(run.timing, run.timing[1:]):
        seconds = line["seconds"] - before["seconds"]
        if seconds > 0:
            steps.append(int(line["step"]))
            values.append((line["pairs"] - before["pairs"]) / seconds)
    return steps, values


def _drawn(chart: Chart, runs: Sequence[RunData]) -> dict[str, Any]:
    tables = []
    for index, run in enumerate(runs):
        curves = {label: _curve(chart, label, run) for label in chart.metrics}
        curves = {label: curve for label, curve in curves.items() if any(y is not None for y in curve[1])}
        first = next(iter(chart.metrics))
        if not chart.band:
            tables += _tables(index, curves, {})
        elif first in curves:
            tables += _tables(index, curves, {first: _band(chart.metrics[first], run)})
    level = chart.level
    starts = {run.start_loss for run in runs}
    if chart.start and len(starts) == 1 and (start := starts.pop()) is not None:
        level = ("ln 2: policy = reference" if math.isclose(start, math.log(2), rel_tol=1e-6) else "start", start)
    return {
        "tab": chart.tab,
        "title": chart.title,
        "help": chart.help,
        "level": None if level is None else {"label": level[0], "at": level[1]},
        "tables": tables,
    }


def _curve(chart: Chart, label: str, run: RunData) -> Curve:
    if not chart.ratio_to:
        return run.series(chart.metrics[label])
    above, below = chart.metrics[label], chart.ratio_to[label]
    there = [line for line in run.lines if above in line and below in line]
    return [x["step"] for x in there], [
        x[above] / x[below] if x[above] is not None and x[below] else None for x in there
    ]


def _band(metric: str, run: RunData) -> dict[int, tuple[float | None, float | None]]:
    """The interval of a metric by step."""
    return {
        line["step"]: (line.get(f"{metric}/low"), line.get(f"{metric}/high")) for line in run.lines if metric in line
    }


def _tables(
    index: int, curves: Mapping[str, Curve], bands: Mapping[str, Mapping[int, tuple[float | None, float | None]]]
) -> list[dict[str, Any]]:
    """Curves of one run; those at the same steps share them."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for label, (steps, _) in curves.items():
        groups.setdefault(tuple(steps), []).append(label)
    found = []
    for places, labels in groups.items():
        steps = list(places)
        shown = thinned([curves[label][1] for label in labels], POINTS)
        series = []
        for label in labels:
            one: dict[str, Any] = {"label": label, "y": [_short(curves[label][1][i]) for i in shown]}
            if label in bands:
                ends = [bands[label][steps[i]] for i in shown]
                one |= {"low": [_short(low) for low, _ in ends], "high": [_short(high) for _, high in ends]}
            series.append(one)
        found.append({"run": index, "x": [steps[i] for i in shown], "of": len(steps), "series": series})
    return found


def _cost(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Speed and forwards, which come from the timing and not from the metrics' means."""
    charts = (
        ("Pairs per second", "Between two logs: validation, checkpoints and generated pairs are in it.", rates),
        ("Images through the UNets", "Since the run began: policy and reference, both sides, samples, inversions.",
         lambda run: run.series("unet_forwards")),
    )  # fmt: skip
    return [
        {
            "tab": "cost",
            "title": title,
            "help": text,
            "level": None,
            "tables": [t for i, run in enumerate(runs) if (c := curve(run))[0] for t in _tables(i, {title: c}, {})],
        }
        for title, text, curve in charts
    ]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")
