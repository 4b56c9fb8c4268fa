"""Several scorers' verdicts on a pair as one: per-axis scores and how they are put together.

VisionPrefer (arXiv 2404.15100) scores prompt-following, aesthetics, fidelity and harmlessness apart and aggregates
them; MODPO (arXiv 2310.03708) weighs reward functions; Reward Consistency (arXiv 2504.11337) keeps the pairs on which
rewards agree. With axes k, weights w_k > 0 and gaps g_k = w_k (s_k(first image) − s_k(second image)):

    sum         the scores of an image are Σ_k w_k s_k; the gap is Σ_k g_k
    min         the axis with the smallest |g_k| gives the pair its two scores, w_k s_k (the first named, where equal):
                a pair is as clear as its least clear axis. Where axes agree this is their verdict with the most
                cautious margin; where they do not, the verdict is that of the axis nearest to a tie, with its margin
    all_agree   sum, over the pairs whose gaps do not have opposite signs; the others are left out, counted and named. A
                tie on an axis agrees with everything

Scores keep their units, so the weights do the scaling: PickScore's gaps are about a hundred times HPSv2's. An axis
without a score for a pair (an image that does not open) leaves the pair without scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from diffalign.data.row import DISAGREEMENT, DataError
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.scores import Scores, read_scores, require_scores

Aggregate = Literal["sum", "min", "all_agree"]


@dataclass(frozen=True)
class Axis:
    """One scorer's file of scores, and what its unit is worth."""

    name: str
    file: str
    weight: float = 1.0


def use_axes(table: PairTable, axes: Sequence[Axis], how: Aggregate, *, relabel: bool) -> None:
    """Gives a table the scores that the axes' files amount to, as `use_scores` does with one file.

    With all_agree, pairs on which axes disagree go to `table.problems`. Raises DataError where a file has no line for
    a pair, or when no pair is left.
    """
    if how not in get_args(Aggregate):
        raise DataError(f"aggregate = {how!r}; allowed are {', '.join(get_args(Aggregate))}")
    found = {axis: read_scores(axis.file) for axis in axes}
    for axis, scores in found.items():
        require_scores(table, scores, f"data.scores: {axis.file}")
    if how == "all_agree":
        table.leave_out(DISAGREEMENT, _disagreements(table, found))
        table.require_usable()
    table.take_scores([_combined(name, found, how) for name in table.ids], relabel=relabel)


def _combined(name: str, found: dict[Axis, Scores], how: Aggregate) -> tuple[float, float]:
    """Scores of a pair's images in stored order; nan where an axis has none."""
    weighted = [(axis.weight * scores[name][0], axis.weight * scores[name][1]) for axis, scores in found.items()]
    if not all(math.isfinite(one) and math.isfinite(two) for one, two in weighted):
        return math.nan, math.nan
    if how == "min":
        return min(weighted, key=lambda pair: abs(pair[0] - pair[1]))
    return sum(one for one, _ in weighted), sum(two for _, two in weighted)


def _disagreements(table: PairTable, found: dict[Axis, Scores]) -> dict[int, str]:
    """Why each pair with gaps of opposite signs is left out, by its index."""
    reasons = {}
    for index, name in enumerate(table.ids):
        gaps = {axis.name: axis.weight * (scores[name][0] - scores[name][1]) for axis, scores in found.items()}
        first = [f"{axis} by {gap:.4g}" for axis, gap in gaps.items() if gap > 0]
        second = [f"{axis} by {-gap:.4g}" for axis, gap in gaps.items() if gap < 0]
        if first and second:
            reasons[index] = f"{', '.join(first)} for the first image; {', '.join(second)} for the second"
    return reasons
