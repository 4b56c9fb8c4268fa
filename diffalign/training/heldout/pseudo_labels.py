"""Labels of pairs by a tuned model: the second stage of Semi-DPO (arXiv 2604.24952; L-CodingSpace/Semi-DPO).

A model that was tuned on clean pairs is a classifier of others: the sign of its margin says which image it prefers, the
size how sure it is. The surest pairs get its label; the next run trains on them and on the clean pairs, whose labels
stay.

Differs from the release, which measures each pair at 10 timesteps, has a label for each of the 10 intervals where the
margin is among the largest fifth there, and trains on a pair within its labelled intervals alone. A row of pairs has
one label, so here it is the sign of the pair's score, which weighs its points together (`doubtful.py`). Also left out:
pairs that were labelled in an earlier round come last there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffalign.data.relabel import Choice, Decision
from diffalign.errors import DiffalignError
from diffalign.training.heldout.doubtful import Doubts


@dataclass(frozen=True)
class Selection:
    """Which pairs the model labels. Raises DiffalignError unless exactly one of `share` and `threshold` is given."""

    share: float | None = 0.2  # of the pairs, those with the largest |score|; the release: above the 80th percentile
    threshold: float | None = None  # or those whose |score| is at least this
    unsure: str = "drop"  # the other pairs: dropped, as in the release, or "keep" with the label they have
    keep_trained: bool = False  # pairs that the run trained on keep their label, as the release's clean pairs do

    def __post_init__(self) -> None:
        if (self.share is None) == (self.threshold is None):
            raise DiffalignError("give a share of the pairs or a threshold of the score, one of them")


def pseudo_labels(doubts: Doubts, selection: Selection, where: str) -> tuple[dict[str, Decision], float]:
    """The model's decision about every measured pair, by id, and the least |score| that was enough for a label.

    where: what decided, for messages. A score of exactly 0 is never enough, and pairs that could not be measured have
    none.
    """
    table, scores = doubts.table, {doubt.index: doubt.score for doubt in doubts.ranked}
    trained = doubts.trained if selection.keep_trained else frozenset()
    least = least_score([score for place, score in scores.items() if table.ids[place] not in trained], selection)
    found: dict[str, Decision] = {}
    for place, id in enumerate(table.ids):
        score = scores.get(place, 0.0)
        choice: Choice = "drop" if selection.unsure == "drop" else "keep"
        if id in trained:
            choice = "keep"
        elif score != 0 and abs(score) >= least:
            choice = "swap" if score < 0 else "keep"
        found[id] = Decision(id, choice, where, table.prompts[place], table.index.first[place])
    return found, least


def least_score(scores: Sequence[float], selection: Selection) -> float:
    """The |score| from which on a pair is labelled: the threshold, or that of the last pair within the share."""
    if selection.share is None:
        assert selection.threshold is not None
        return selection.threshold
    sizes = sorted(map(abs, scores), reverse=True)
    count = math.floor(selection.share * len(sizes) + 0.5)
    return sizes[count - 1] if count else math.inf
