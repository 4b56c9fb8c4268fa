"""Kappa against examples from the literature, a computation by hand, and the asymptotic standard error."""

from __future__ import annotations

from math import isnan, sqrt

import numpy as np
import pytest

from diffalign.evaluation.by_eye.agreement import agreement, agreements, cohen_kappa, fleiss_kappa
from diffalign.evaluation.by_eye.votes import Event
from tests.evaluation.by_eye.helpers import event

# Fleiss (1971), 14 raters of 10 subjects in 5 categories; the table of Wikipedia's "Fleiss' kappa", which gives .210.
FLEISS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def votes(of: str) -> dict[str, Event]:
    """Votes on pairs 0, 1, … from letters: f, s, t, - (skip)."""
    words = {"f": "first", "s": "second", "t": "tie", "-": "skip"}
    return {str(i): event(str(i), words[letter]) for i, letter in enumerate(of)}


def prompts(n: int) -> dict[str, str]:
    return {str(i): f"prompt {i}" for i in range(n)}


def test_published_examples() -> None:
    assert float(cohen_kappa(np.array([[20.0, 5.0], [10.0, 15.0]]))) == pytest.approx(0.4)  # Wikipedia, "Cohen's kappa"
    assert fleiss_kappa(np.array(FLEISS, float)) == pytest.approx(0.210, abs=5e-4)


def test_two_annotators_by_hand() -> None:
    """Ten pairs, the last skipped by b. Of nine a has f 5 s 3 t 1, b has f 4 s 3 t 2, and 7 are equal:
    p_o = 7/9, p_e = (5*4 + 3*3 + 1*2)/81 = 31/81, kappa = (63 - 31)/(81 - 31) = .64."""
    found = agreement({"a": votes("fffffssstf"), "b": votes("ffffssstt-")}, prompts(10))
    assert found.pairs == 9
    assert found.kind == "Cohen's kappa"
    assert found.agreement.value == pytest.approx(7 / 9)
    assert found.kappa.value == pytest.approx(0.64)


def test_three_annotators_by_hand() -> None:
    """Pairs fff, ffs, sst: P = (1 + 1/3 + 1/3)/3 = 45/81; shares 5/9, 3/9, 1/9, p_e = 35/81; (45 - 35)/(81 - 35)."""
    three = {"a": votes("ffs"), "b": votes("ffs"), "c": votes("fst")}
    every, *couples = agreements(three, prompts(3))
    assert every.kind == "Fleiss' kappa"
    assert every.kappa.value == pytest.approx(10 / 46)
    assert every.agreement.value == pytest.approx(5 / 9)
    assert [each.annotators for each in couples] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert couples[0].kappa.value == 1


def test_what_has_no_kappa() -> None:
    same = agreement({"a": votes("fff"), "b": votes("fff")}, prompts(3))
    assert same.agreement.value == 1
    assert isnan(same.kappa.value)  # chance alone would agree as well
    apart = agreement({"a": votes("ff--"), "b": votes("--ss")}, prompts(4))
    assert apart.pairs == 0
    assert agreements({"a": votes("f")}, prompts(1)) == []


def test_the_interval_is_that_of_the_standard_error() -> None:
    """Fleiss, Cohen & Everitt (1969) for independent pairs, as many pairs as prompts; wider where prompts repeat."""
    rng, n = np.random.default_rng(0), 400
    truth = rng.choice(3, n, p=[0.45, 0.4, 0.15])
    sides = [np.where(rng.random(n) < 0.75, truth, rng.integers(0, 3, n)) for _ in range(2)]
    a, b = (votes("".join("fst"[k] for k in side)) for side in sides)
    found = agreement({"a": a, "b": b}, prompts(n)).kappa
    p = np.zeros((3, 3))
    np.add.at(p, tuple(sides), 1 / n)
    row, column = p.sum(1), p.sum(0)
    observed, expected = np.trace(p), row @ column
    kappa = (observed - expected) / (1 - expected)
    on = sum(p[i, i] * ((1 - expected) - (row[i] + column[i]) * (1 - observed)) ** 2 for i in range(3))
    off = sum(p[i, j] * (column[i] + row[j]) ** 2 for i in range(3) for j in range(3) if i != j) * (1 - observed) ** 2
    variance = (on + off - (observed * expected - 2 * expected + observed) ** 2) / (n * (1 - expected) ** 4)
    assert found.value == pytest.approx(kappa)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * sqrt(variance), rel=0.05)
    grouped = {str(i): f"prompt {i % 40}" for i in range(n)}
    repeated = {name: {str(i): some[str(i % 40)] for i in range(n)} for name, some in (("a", a), ("b", b))}
    wide = agreement(repeated, grouped).kappa
    assert wide.high - wide.low > 2 * (found.high - found.low)
