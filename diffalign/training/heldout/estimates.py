"""The metrics of held-out pairs: loss, accuracy and margin with 95 % intervals over prompts, and by quarter of t.

heldout/loss        mean of the objective's loss
heldout/accuracy    share of points at which the chosen image has the higher implicit reward; equal ones count half
heldout/margin      mean difference of the implicit rewards
heldout/score       mean of tanh(margin / spread), where the spread is the root mean square of all pairs' margins at the
                    same point: in [-1, 1], whatever the size of the margins, and with less noise than the accuracy
…/low, …/high       the ends of the interval, which counts prompts: pairs of one prompt resemble each other
…/q1 to …/q4        the mean in a quarter of the timesteps; q1 has the least noise
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffalign.evaluation.stats import Estimate, clustered_mean, clustered_rate
from diffalign.training.heldout.measure import PointValues
from diffalign.training.metrics import QUARTERS

PREFIX = "heldout"
LOSS, ACCURACY, MARGIN = f"{PREFIX}/loss", f"{PREFIX}/accuracy", f"{PREFIX}/margin"
SCORE = f"{PREFIX}/score"


@dataclass(frozen=True)
class Measurement:
    """What held-out pairs showed at one step."""

    metrics: dict[str, float]
    of_pairs: dict[str, dict[int, float]]  # each pair's mean by metric without interval and quarter, and by its index


def estimates(values: Sequence[PointValues], prompts: Sequence[str], timesteps: int) -> Measurement:
    """The metrics of measured points; `prompts` are those of the table that the points' pairs are in.

    A pair counts as much as any other. Without margins there is a loss alone.
    """
    ordered = sorted(values, key=lambda value: (value.pair, value.point))
    pairs, places = np.unique([value.pair for value in ordered], return_inverse=True)
    by_point = {LOSS: np.array([value.loss for value in ordered])}
    if ordered[0].margin is not None:
        margin = np.array([value.margin for value in ordered], float)
        right = np.where(np.isnan(margin), np.nan, (np.sign(margin) + 1) / 2)
        by_point |= {ACCURACY: right, MARGIN: margin, SCORE: bounded(margin, [value.point for value in ordered])}
    per_pair = {name: np.bincount(places, x) / np.bincount(places) for name, x in by_point.items()}
    of_prompts = [prompts[pair] for pair in pairs]
    metrics: dict[str, float] = {}
    for name, x in per_pair.items():
        metrics |= named(name, (clustered_rate if name == ACCURACY else clustered_mean)(x, of_prompts))
    if all(value.t is not None for value in ordered):
        quarter = np.array([(value.t or 0) * QUARTERS // timesteps for value in ordered])
        for q in range(QUARTERS):
            inside = quarter == q
            if inside.any():
                metrics |= {f"{what}/q{q + 1}": float(x[inside].mean()) for what, x in by_point.items()}
    of_pairs = {name: dict(zip(pairs.tolist(), x.tolist(), strict=True)) for name, x in per_pair.items()}
    return Measurement(metrics, of_pairs)


def bounded(margins: NDArray[np.float64], points: Sequence[int]) -> NDArray[np.float64]:
    """Margins in units of their root mean square at the same of a pair's points, bounded by tanh."""
    _, places = np.unique(points, return_inverse=True)
    spread = np.sqrt(np.bincount(places, margins**2) / np.bincount(places))[places]
    return np.tanh(margins / np.where(spread == 0, 1.0, spread))


def named(what: str, estimate: Estimate) -> dict[str, float]:
    """A metric with the ends of its interval."""
    return {what: estimate.value, f"{what}/low": estimate.low, f"{what}/high": estimate.high}
