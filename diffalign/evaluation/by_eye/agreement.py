"""How far annotators agree: the share of equal votes, and kappa, which takes off what chance would give.

Two annotators: Cohen's kappa (1960). More: Fleiss' (1971), on the pairs that all of them judged. The votes are first,
second and tie; a skipped pair is not judged. Images of one prompt are correlated, so the intervals resample prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isnan, sqrt

import numpy as np
from numpy.typing import NDArray

from diffalign.evaluation.by_eye.votes import Event
from diffalign.evaluation.stats import DEFAULT, Bootstrap, Estimate, clustered_rate, prompt_weights, student_ratio

CATEGORIES = ("first", "second", "tie")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Of two or more annotators, on the pairs that each of them judged."""

    annotators: tuple[str, ...]
    pairs: int
    agreement: Estimate  # share of equal votes, over all couples of annotators
    kappa: Estimate  # NaN where all votes are the same, or no pair was judged by all

    @property
    def kind(self) -> str:
        """Which kappa it is."""
        return "Cohen's kappa" if len(self.annotators) == 2 else "Fleiss' kappa"


def agreements(votes: Mapping[str, Mapping[str, Event]], prompts: Mapping[str, str]) -> list[Agreement]:
    """The agreement of all annotators, and of each couple where they are more than two; nothing for fewer than two.

    votes: by annotator and pair. prompts: by pair.
    """
    names = tuple(votes)
    groups = [names] if len(names) == 2 else [names, *combinations(names, 2)] if len(names) > 2 else []
    return [agreement({name: votes[name] for name in group}, prompts) for group in groups]


def agreement(
    votes: Mapping[str, Mapping[str, Event]], prompts: Mapping[str, str], bootstrap: Bootstrap = DEFAULT
) -> Agreement:
    """The agreement of these annotators on the pairs that each of them judged."""
    judged = [{pair for pair, event in some.items() if event.vote in CATEGORIES} for some in votes.values()]
    common = sorted(set.intersection(*judged))
    nothing = Estimate(float("nan"), float("nan"), float("nan"))
    if not common:
        return Agreement(tuple(votes), 0, nothing, nothing)
    codes = np.array([[CATEGORIES.index(some[pair].vote) for some in votes.values()] for pair in common])
    of_pairs = [prompts[pair] for pair in common]
    one_hot = np.eye(len(CATEGORIES))[codes]  # pair annotator category
    equal = _equal(one_hot.sum(1))
    if codes.shape[1] == 2:
        tables = np.einsum("pi,pj->pij", one_hot[:, 0], one_hot[:, 1])
        kappa = _clustered(cohen_kappa, tables, of_pairs, bootstrap)
    else:
        counts = one_hot.sum(1)
        terms = np.concatenate([counts, equal[:, None], np.ones((len(common), 1))], 1)  # all that Fleiss' formula sums
        kappa = _clustered(_fleiss_of_sums, terms, of_pairs, bootstrap)
    return Agreement(tuple(votes), len(common), clustered_rate(equal, of_pairs, level=bootstrap.level), kappa)


def cohen_kappa(table: Floats) -> Floats:
    """(p_o - p_e) / (1 - p_e) of tables [... category category] of one annotator's votes by the other's."""
    n = table.sum((-2, -1))
    observed = np.trace(table, axis1=-2, axis2=-1) / n
    expected = (table.sum(-1) * table.sum(-2)).sum(-1) / n**2
    return _beyond_chance(observed, expected)


def fleiss_kappa(counts: Floats) -> float:
    """Of counts [pair category], with the same number of annotators for each pair."""
    terms = np.concatenate([counts, _equal(counts)[:, None], np.ones((len(counts), 1))], 1)
    return float(_fleiss_of_sums(terms.sum(0)))


def _fleiss_of_sums(sums: Floats) -> Floats:
    """From sums [... term] over pairs: counts of each category, share of equal couples, 1."""
    counts, equal, pairs = sums[..., :-2], sums[..., -2], sums[..., -1]
    expected = ((counts / counts.sum(-1, keepdims=True)) ** 2).sum(-1)
    return _beyond_chance(equal / pairs, expected)


def _equal(counts: Floats) -> Floats:
    """Share [pair] of the couples of annotators whose votes are equal."""
    n = counts.sum(1)
    return ((counts**2).sum(1) - n) / (n * (n - 1))


def _beyond_chance(observed: Floats, expected: Floats) -> Floats:
    """(observed - expected) / (1 - expected); NaN where chance alone gives full agreement."""
    room = 1 - expected
    return np.where(room > 1e-12, (observed - expected) / np.where(room > 1e-12, room, 1), np.nan)


def _clustered(of: Callable[[Floats], Floats], terms: Floats, prompts: Sequence[str], bootstrap: Bootstrap) -> Estimate:
    """A statistic of the sum of terms [pair ...], with percentiles over resampled prompts, widened for few prompts."""
    value = float(of(terms.sum(0)))
    _, p = np.unique(np.asarray(prompts, dtype=object).astype(str), return_inverse=True)
    n = int(p.max()) + 1
    if n < 2 or isnan(value):
        return Estimate(value, float("nan"), float("nan"))
    sums = np.zeros((n, *terms.shape[1:]))
    np.add.at(sums, p, terms)
    rng, tail = np.random.default_rng(bootstrap.seed), (1 - bootstrap.level) / 2
    drawn = np.concatenate([of(np.tensordot(w, sums, 1)) for w in prompt_weights(rng, n, bootstrap.resamples)])
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    widen = sqrt(n / (n - 1)) * student_ratio(tail, n - 1)
    ends = np.clip([value + widen * (low - value), value + widen * (high - value)], -1, 1)
    return Estimate(value, float(ends[0]), float(ends[1]))
