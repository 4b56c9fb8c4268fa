"""The metrics of held-out pairs: loss, accuracy and margin with 95 % intervals over prompts, and by quarter of t.

heldout/loss        mean of the objective's loss
heldout/accuracy    share of points at which the chosen image has the higher implicit reward; equal ones count half
heldout/margin      mean difference of the implicit rewards
…/low, …/high       the ends of the interval, which counts prompts: pairs of one prompt resemble each other
…/q1 to …/q4        the mean in a quarter of the timesteps; q1 has the least noise
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffalign.evaluation.stats import Estimate, clustered_mean, clustered_rate
from diffalign.training.heldout.measure import PointValues
from diffalign.training.metrics import QUARTERS

PREFIX = "heldout"
LOSS, ACCURACY, MARGIN = f"{PREFIX}/loss", f"{PREFIX}/accuracy", f"{PREFIX}/margin"


def estimates(values: Sequence[PointValues], prompts: Sequence[str], timesteps: int) -> dict[str, float]:
    """The metrics of measured points by name; `prompts` are those of the table that the points' pairs are in.

    A pair counts as much as any other. Without margins there is a loss alone.
    """
    ordered = sorted(values, key=lambda value: (value.pair, value.point))
    _, places = np.unique([value.pair for value in ordered], return_inverse=True)
    of_pairs = [prompts[pair] for pair in dict.fromkeys(value.pair for value in ordered)]

    def per_pair(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(places, x) / np.bincount(places)

    loss = np.array([value.loss for value in ordered])
    found = {LOSS: clustered_mean(per_pair(loss), of_pairs)}
    by_point = {LOSS: loss}
    if ordered[0].margin is not None:
        margin = np.array([value.margin for value in ordered], float)
        right = np.where(np.isnan(margin), np.nan, (np.sign(margin) + 1) / 2)
        found[ACCURACY] = clustered_rate(per_pair(right), of_pairs)
        found[MARGIN] = clustered_mean(per_pair(margin), of_pairs)
        by_point |= {ACCURACY: right, MARGIN: margin}
    metrics = {name: x for what, estimate in found.items() for name, x in _named(what, estimate)}
    if all(value.t is not None for value in ordered):
        quarter = np.array([(value.t or 0) * QUARTERS // timesteps for value in ordered])
        for q in range(QUARTERS):
            inside = quarter == q
            if inside.any():
                metrics |= {f"{what}/q{q + 1}": float(x[inside].mean()) for what, x in by_point.items()}
    return metrics


def _named(what: str, estimate: Estimate) -> list[tuple[str, float]]:
    return [(what, estimate.value), (f"{what}/low", estimate.low), (f"{what}/high", estimate.high)]
