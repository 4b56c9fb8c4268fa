"""Checks that ranges, thresholds and weights of a config are in the unit of the scores that they apply to.

A scorer declares the span of its scores (`rewards/base.py`), and a file of scores records it. A range or weight that
only another unit can explain is refused. Scores of unknown origin are judged by the differences within pairs. A
curriculum sorts by these differences and has no threshold, so it has no unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from statistics import median
from typing import Any

from diffalign.data.row import DataError
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.score_aggregation import Axis
from diffalign.data.table.scores import span_in
from diffalign.rewards import declared_span

Span = tuple[float, float]
PAIRS = 10_000  # whose gaps are read
OTHER_UNIT = 10.0  # a range this many times another is of another unit
NEGLIGIBLE = 30.0  # an axis whose weighted span is this many times smaller decides nothing
LARGEST = 1.0  # half of the gaps above one range: nearly every weight would be at its limit
SMALLEST = 1e-3  # half of them below this share of it: every weight would be near 0


def check_units(objective: Any, source: Any, axes: Sequence[Axis], table: Any) -> None:
    """Raises DataError for a range, threshold or weight that cannot be meant in the unit of the scores.

    source: settings of a source that generates pairs, or None. axes: of `data.scores`. table: None before it is open.
    """
    has_range, scorer = hasattr(objective, "score_low"), getattr(source, "scorer", None)
    span = None if scorer is None else declared_span(scorer)
    if span is not None:
        _check_threshold(source, str(scorer), span)
        if has_range:
            _check_range(objective, span, f"scorer {scorer}")
    if not isinstance(table, PairTable):
        return
    spans = [span_in(axis.file) for axis in axes]
    if len(axes) > 1:
        _check_axes(axes, spans)
    elif has_range and axes and spans[0] is not None:
        low, high = spans[0]
        _check_range(objective, (axes[0].weight * low, axes[0].weight * high), f"data.scores: {axes[0].file}")
    if has_range:
        _check_gaps(objective, table)


def _check_threshold(source: Any, scorer: str, span: Span) -> None:
    """A source's threshold must be smaller than the span of its scorer."""
    width = span[1] - span[0]
    tanh, least = getattr(source, "threshold", None), getattr(source, "min_gap", None)
    if tanh is not None and 2 * math.atanh(tanh) >= width:
        raise DataError(
            f"source.threshold = {tanh}: tanh(gap / 2) exceeds it for gaps above {2 * math.atanh(tanh):.3g}, and all "
            f"scores of {scorer} lie in {span[0]:.4g} … {span[1]:.4g}: no pair would be valid. Set it below "
            f"{math.tanh(width / 20):.2g}, a tenth of that span, or take a scorer in logits (pickscore, step-aware)"
        )
    if least is not None and least >= width:
        raise DataError(
            f"source.min_gap = {least}: all scores of {scorer} lie in {span[0]:.4g} … {span[1]:.4g}, so no pair would "
            f"be valid. Give it in that unit, below {width / 10:.2g}"
        )


def _check_range(objective: Any, span: Span, whose: str) -> None:
    """The range of an objective must be of the order of the scorer's own."""
    ours, own = objective.score_high - objective.score_low, span[1] - span[0]
    if not own / OTHER_UNIT < ours < own * OTHER_UNIT:
        raise DataError(
            f"objective.score_low = {objective.score_low:.6g}, score_high = {objective.score_high:.6g}: a range of "
            f"{ours:.3g}, and scores by {whose} lie in {span[0]:.6g} … {span[1]:.6g}. Weights would be those of gaps "
            f"{own / ours:.3g} times as large: set objective.score_low: {span[0]!r} and objective.score_high: "
            f"{span[1]!r}, or another range in that unit"
        )


def _check_gaps(objective: Any, table: PairTable) -> None:
    """Without a known scorer the gaps themselves must be of the order of the range."""
    pairs = (table.scores(index) for index in islice(range(len(table)), PAIRS))
    gaps = [abs(one - two) for one, two in (pair for pair in pairs if pair is not None)]
    gaps = [gap for gap in gaps if gap > 0 and math.isfinite(gap)]
    width = objective.score_high - objective.score_low
    if not gaps or SMALLEST * width <= (middle := median(gaps)) <= LARGEST * width:
        return
    raise DataError(
        f"objective.score_low = {objective.score_low:.6g}, score_high = {objective.score_high:.6g}: a range of "
        f"{width:.3g}, and half of the pairs' scores differ by more than {middle:.3g}, {middle / width:.3g} ranges: "
        f"the weights would nearly all be {'at their end' if middle > width else '0'}. The scores are in another unit. "
        "Set both to the range of your scorer (pickscore: 11.543526500463486 and 28.201571106910706, 100 times the "
        "release's cosine)"
    )


def _check_axes(axes: Sequence[Axis], spans: Sequence[Span | None]) -> None:
    """Axes without weights must be of one order, or the smaller ones decide nothing."""
    widths = {axis: span[1] - span[0] for axis, span in zip(axes, spans, strict=True) if span is not None}
    if len(widths) < 2 or any(axis.weight != 1 for axis in axes):
        return
    least, most = min(widths, key=widths.__getitem__), max(widths, key=widths.__getitem__)
    if widths[most] >= NEGLIGIBLE * widths[least]:
        raise DataError(
            f"data.scores: the scores of {least.file} span {widths[least]:.3g} and those of {most.file} "
            f"{widths[most]:.3g}: without weights the former decide nothing. Give weights, e.g. {{file: {least.file}, "
            f"weight: {widths[most] / widths[least]:.3g}}} for equal influence"
        )
