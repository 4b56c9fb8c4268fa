"""Losses and slopes in float32, as in training, against each paper's formula with 60 digits.

An autograd graph may be right in float64 and wrong in float32: e^20 − e^20 + 1 is 0 there, and so was a slope.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from mpmath import mp, mpf

from diffalign.objectives import OBJECTIVES
from diffalign.objectives.base import Objective
from diffalign.types import Evidence

BETA = 20.0  # b/2 = 10, so that a side's reward is −10·D
REFERENCE = 8.0
# rewards of (chosen, rejected) that a side's error stands for: small, as at the start of training, and far
REWARDS = [(2e-4, -1e-4), (-1e-3, 2e-3), (0.3, -0.4), (-0.7, 0.2), (4.0, -4.5), (-4.0, 4.5), (-10.0, 10.5)]
FAR = [(25.0, -25.0), (-25.0, 25.0), (24.0, 23.0), (-23.0, -24.0), (-10.0, -40.0)]
Statement = Callable[..., Any]


def sigma(z: Any) -> Any:
    return 1 / (1 + mp.exp(-z))


def of_logit(h: Any) -> Any:
    """−log σ(h)."""
    return mp.log1p(mp.exp(-h))


def link(name: str, alpha: float = 1.0, limit: float = 20.0) -> Statement:
    def g(u: Any) -> Any:
        if name == "js":
            return mp.log(2 * mp.exp(u) / (1 + mp.exp(u)))
        x = -alpha * u
        grown = mp.expm1(x) if x <= limit else mp.expm1(limit) + mp.exp(limit) * (x - limit)
        return u if name == "reverse_kl" else -grown / alpha

    return lambda c, r: of_logit(g(c) - g(r))


def kto(c: Any, r: Any, zero: bool, kl: Any) -> Any:
    """kl is held constant, as the method says."""
    point = 0 if zero else kl
    return ((1 - sigma(c - point)) + (1 - sigma(-(r - point)))) / 2


def linear_dpo(c: Any, r: Any, logit: Any) -> Any:
    """The logit of the weight is held constant, as the method says."""
    return min(max(mpf("0.5") - mpf("0.4") * logit, mpf("0.001")), mpf("0.999")) * (r - c) / 10


def spo(c: Any, r: Any, weight: Any = 2) -> Any:
    def kept(reward: Any) -> Any:
        return min(max(weight * reward / 10, mp.log(1 - mpf(0.1))), mp.log(1 + mpf(0.1)))

    return of_logit(10 * kept(c) - 10 * kept(r))


def kl(p: Any, rest: Any) -> Any:
    """The divergence from a coin of 3/4, with `rest` = 1 - p to all digits."""
    return p * mp.log(p / mpf(0.75)) + rest * mp.log(rest / mpf(0.25))


# objective -> ways it is set, each with its loss as a function of the rewards r = −10·(E_policy − E_reference)
STATEMENTS: dict[str, list[tuple[dict[str, Any], Statement]]] = {
    "dpo": [({"beta": BETA}, lambda c, r: of_logit(c - r))],
    "inpo": [({"beta": BETA}, lambda c, r: of_logit(c - r))],
    "listwise_dpo": [({"beta": BETA}, lambda c, r: of_logit(c - r))],
    "inversion_dpo": [({"beta": BETA}, lambda c, r: of_logit(c - r))],
    "smpo": [({"beta": BETA}, lambda c, r: of_logit(2 * (c - r)))],
    "ipo": [({"tau": 5.0}, lambda c, r: ((c - r) / 10 - mpf(1) / 10) ** 2)],
    "cdpo": [
        (
            {"beta": BETA, "label_smoothing": 0.25},
            lambda c, r: mpf(0.75) * of_logit(c - r) + mpf(0.25) * of_logit(r - c),
        )
    ],
    "robust_dpo": [
        (
            {"beta": BETA, "label_smoothing": 0.25},
            lambda c, r: (mpf(0.75) * of_logit(c - r) - mpf(0.25) * of_logit(r - c)) / mpf(0.5),
        )
    ],
    "poly_dpo": [
        ({"beta": BETA, "alpha": a}, lambda c, r, a=a: of_logit(c - r) + mpf(a) * (1 - sigma(c - r)))
        for a in (1.0, -0.5)
    ],
    "linear_dpo": [({"beta": BETA, "eta": 0.001}, None)],  # below
    "dmpo": [({"beta": BETA, "alpha": 0.25}, lambda c, r: kl(sigma(c - r), sigma(r - c)))],
    "f_dpo": [
        ({"beta": BETA, "link": "reverse_kl"}, link("reverse_kl")),
        ({"beta": BETA, "link": "js"}, link("js")),
        ({"beta": BETA, "link": "forward_kl"}, link("forward_kl")),
        ({"beta": BETA, "link": "forward_kl", "max_exponent": 38.0}, link("forward_kl", limit=38.0)),
        ({"beta": BETA, "link": "alpha", "alpha": 0.5}, link("alpha", 0.5)),
        ({"beta": BETA, "link": "alpha", "alpha": 1 / 1024}, link("alpha", 1 / 1024)),
    ],
    "kto": [({"beta": 10.0, "reference_point": point}, None) for point in ("pair", "zero")],  # below
    "dso_dro": [({"margin": 1.0}, lambda c, r: -c / 10 - min(-r / 10, mpf(1)))],
    "diffusion_dro": [({"margin": 0.125}, lambda c, r: max(mpf(0), mpf(0.125) - (c - r) / 10))],
    "seppo": [
        ({"beta": BETA, "flip": "none"}, lambda c, r: of_logit(c - r)),
        ({"beta": BETA, "flip": "anchor"}, lambda c, r: of_logit(c - mp.sign(c) * r)),
    ],
    "spo": [({}, spo)],
    "sft": [({}, lambda c, r: -c / 10)],
}
CASES = [(name, *case) for name, cases in STATEMENTS.items() for case in cases]


def test_every_objective_has_a_statement() -> None:
    apart = {"mapo", "dspo", "diffusion_nft"}  # no functions of rewards: below; the last in test_diffusion_nft.py
    assert {*STATEMENTS, *apart} == set(OBJECTIVES)


@pytest.mark.parametrize(("name", "settings", "statement"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
@pytest.mark.parametrize("rewards", [*REWARDS, *FAR], ids=str)
def test_loss_and_slope(
    name: str, settings: dict[str, Any], statement: Statement | None, rewards: tuple[float, float]
) -> None:
    objective = OBJECTIVES[name](**settings)
    policy = torch.tensor([REFERENCE - x / 10 for x in rewards])[:, None].requires_grad_()
    reference = torch.full((2, 1), REFERENCE)
    weight = torch.full({"smpo": (1,)}.get(name, (2, 1)), 2.0) if name in ("smpo", "spo") else None
    seen = Evidence(policy, reference, weight=weight)
    loss, slope = in_float32(objective, seen)

    mp.dps = 60
    exact = [10 * (mpf(REFERENCE) - mpf(float(x))) for x in policy.detach()]  # the float32 input
    if statement is None:
        kl, logit = max(mpf(0), sum(exact) / 2), exact[0] - exact[1]
        zero = settings.get("reference_point") == "zero"

        def statement(c: Any, r: Any) -> Any:
            return linear_dpo(c, r, logit) if name == "linear_dpo" else kto(c, r, zero, kl)

    if name == "sft":  # the chosen error itself, not its distance from the reference's
        loss -= REFERENCE
    expected = [-10 * mpmath.diff(statement, tuple(exact), side) for side in ((1, 0), (0, 1))]
    # an exponent of x has float32's relative rounding of x, a few times over: 1e-7·x in e^x
    far = 1e-6 * (1 + max(abs(x) for x in rewards))
    sums = ("cdpo", "robust_dpo", "ipo", "linear_dpo", "dmpo", "sft", "dso_dro")  # of terms of about 1
    one = far if name in sums else 1e-35
    assert slope == pytest.approx([float(x) for x in expected], rel=far, abs=one)
    assert loss == pytest.approx(float(statement(*exact)), rel=far, abs=one)


@pytest.mark.parametrize(
    "errors", [(1e-5, 3e-5), (2e-3, 2.5e-3), (0.1, 0.102), (0.12, 0.1), (0.49, 0.53), (0.4, 2.0), (60.0, 40.0)], ids=str
)
def test_mapo(errors: tuple[float, float]) -> None:
    policy = torch.tensor(errors)[:, None].requires_grad_()
    loss, slope = in_float32(OBJECTIVES["mapo"](), Evidence(policy))
    mp.dps = 60

    def statement(c: Any, r: Any) -> Any:
        q_c, q_r = (mpf(0.5) * e / mp.expm1(mpf(0.5) * e) for e in (c, r))
        return c + mpf("0.1") * of_logit(1000 * (q_c - q_r))

    exact = tuple(mpf(float(x)) for x in policy.detach())
    expected = [float(mpmath.diff(statement, exact, side)) for side in ((1, 0), (0, 1))]
    # T·q has a rounding of 1000 · 6e-8 in the logit
    assert slope == pytest.approx(expected, rel=2e-4)
    assert loss == pytest.approx(float(statement(*exact)), rel=1e-4)


@pytest.mark.parametrize("beta", [0.001, 1.0, 8.0])
def test_dspo(beta: float) -> None:
    errors, reference, apart = (0.5, 0.75), (0.625, 0.5), 0.03125
    policy = torch.tensor(errors)[:, None].requires_grad_()
    seen = Evidence(policy, torch.tensor(reference)[:, None], distance=torch.full((2, 1), apart))
    loss, slope = in_float32(OBJECTIVES["dspo"](beta=beta), seen)
    mp.dps = 60

    def statement(c: Any, r: Any) -> Any:
        g = mpf(beta) * sigma(mpf(beta) / 2 * ((c - reference[0]) - (r - reference[1])))
        return (1 - g) * c + g * reference[0] - g * (1 - g) * mpf(apart)

    expected = [float(mpmath.diff(statement, errors, side)) for side in ((1, 0), (0, 1))]
    assert slope == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert loss == pytest.approx(float(statement(*errors)), rel=1e-6)


def in_float32(objective: Objective, seen: Evidence) -> tuple[float, list[float]]:
    loss = objective.score(seen).loss
    assert loss.dtype == torch.float32
    (slope,) = torch.autograd.grad(loss.sum(), seen.policy)
    return loss.item(), slope.flatten().tolist()
