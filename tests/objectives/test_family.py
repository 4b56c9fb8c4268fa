"""KTO, f-DPO and both DROs: by hand, at their limits, and the directions of their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.objectives import DSODRO, FDPO, KTO, DiffusionDPO, DiffusionDRO
from diffalign.objectives.f_dpo import LINKS, tangent_expm1
from diffalign.types import Evidence

ALL = (
    KTO(beta=20.0),
    KTO(beta=20.0, reference_point="zero"),
    DSODRO(margin=0.05),
    DiffusionDRO(margin=0.1),
    *(FDPO(beta=20.0, link=link, alpha=0.5 if link == "alpha" else None) for link in LINKS),
)


def evidence(policy: list[float], reference: list[float]) -> Evidence:
    p, r = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (policy, reference))
    return Evidence(p.requires_grad_(), r)


def slopes(objective: Any, seen: Evidence) -> list[float]:
    """dL/dE of (chosen, rejected)."""
    (grad,) = torch.autograd.grad(objective.score(seen).loss.sum(), seen.policy)
    return grad.flatten().tolist()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def random(pairs: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    reference = torch.rand(2, pairs, generator=g, dtype=torch.float64)
    return reference + 0.1 * torch.randn(2, pairs, generator=g, dtype=torch.float64), reference


@pytest.mark.parametrize(
    ("policy", "settings", "expected"),
    [
        ([0.4, 0.6], {}, 1 - sigmoid(1)),  # g = (.1, -.1), kl = 0
        ([0.3, 0.5], {}, 1 - sigmoid(1)),  # g = (.2, 0), kl = .1: compared as a pair
        ([0.3, 0.5], {"reference_point": "zero"}, (1 - sigmoid(2) + 0.5) / 2),
        ([0.6, 0.6], {}, (1 - sigmoid(-1) + 1 - sigmoid(1)) / 2),  # kl = max(0, -.1)
        ([0.4, 0.6], {"lambda_desirable": 1.6, "lambda_undesirable": 0.4}, 1 - sigmoid(1)),
        ([0.6, 0.6], {"lambda_desirable": 1.6, "lambda_undesirable": 0.4}, 0.8 * sigmoid(1) + 0.2 * sigmoid(-1)),
    ],
)
def test_kto_by_hand(policy: list[float], settings: dict[str, Any], expected: float) -> None:
    score = KTO(beta=10.0, **settings).score(evidence(policy, [0.5, 0.5]))
    assert score.loss.item() == pytest.approx(expected, rel=1e-12)
    assert score.logit.item() == pytest.approx(10 * (policy[1] - policy[0]))


def test_kto_is_the_released_code_on_a_batch_of_the_two_images() -> None:
    """Its statements (train_kto_sd_v1.5.py: g_term, kl, label_scale_g, w_y), for one process and halo sigmoid."""
    policy, reference = random()
    got = KTO(beta=30.0, lambda_desirable=1.2, lambda_undesirable=0.7).score(Evidence(policy, reference)).loss
    labels = torch.tensor([1, 0])
    w = torch.tensor([1.2, 0.7], dtype=torch.float64)
    for i in range(policy.shape[1]):
        g = reference[:, i] - policy[:, i]
        h = torch.sigmoid((2 * labels - 1) * 30.0 * (g - g.mean().clamp(min=0)))
        torch.testing.assert_close(got[i], (w * (1 - h)).mean(), rtol=1e-12, atol=0)


def test_kto_reference_point_carries_no_gradient_and_far_images_have_little() -> None:
    # kl = .1 and both arguments are 1: slopes (1/2) b s(1) s(-1), with kl held fixed
    slope = 0.5 * 10 * sigmoid(1) * sigmoid(-1)
    assert slopes(KTO(beta=10.0), evidence([0.3, 0.5], [0.5, 0.5])) == pytest.approx([slope, -slope])
    near, far = (slopes(KTO(beta=10.0), evidence([0.5 - d, 0.5 + d], [0.5, 0.5])) for d in (0.0, 2.0))
    assert abs(far[0]) < 1e-6 * abs(near[0])


@pytest.mark.parametrize(
    ("policy", "margin", "loss", "slope"),
    [
        ([0.4, 0.6], 0.2, -0.2, [1.0, -1.0]),
        ([0.4, 0.6], 0.05, -0.15, [1.0, 0.0]),  # .4 - (.5 + .05)
        ([0.4, 9.0], 0.2, -0.3, [1.0, 0.0]),  # does not run away
        ([0.9, 0.1], 0.2, 0.8, [1.0, -1.0]),
    ],
)
def test_dso_dro_by_hand(policy: list[float], margin: float, loss: float, slope: list[float]) -> None:
    seen = evidence(policy, [0.5, 0.5])
    score = DSODRO(margin=margin).score(seen)
    assert score.loss.item() == pytest.approx(loss, rel=1e-12)
    assert slopes(DSODRO(margin=margin), seen) == slope
    assert float(score.metrics["bound_rate"]) == float(slope[1] == 0)


def test_dso_dro_without_a_bound_is_the_released_loss() -> None:
    policy, reference = random()
    assert torch.equal(DSODRO(margin=1e6).score(Evidence(policy, reference)).loss, policy[0] - policy[1])


@pytest.mark.parametrize(
    ("policy", "margin", "loss", "slope"),
    [
        ([0.4, 0.5], 0.3, 0.2, [1.0, -1.0]),
        ([0.4, 0.5], 0.05, 0.0, [0.0, 0.0]),
        ([0.7, 0.5], 0.05, 0.25, [1.0, -1.0]),
    ],
)
def test_diffusion_dro_by_hand(policy: list[float], margin: float, loss: float, slope: list[float]) -> None:
    seen = evidence(policy, [0.5, 0.5])
    score = DiffusionDRO(margin=margin).score(seen)
    assert score.loss.item() == pytest.approx(loss, rel=1e-12)
    assert slopes(DiffusionDRO(margin=margin), seen) == slope
    assert float(score.metrics["hinge_rate"]) == float(loss > 0)


def test_diffusion_dro_is_the_papers_maximum_moved_to_zero() -> None:
    """max(m', -R_expert + R_policy) with m' = -m, as in the paper's form, is the hinge less m."""
    policy, reference = random()
    rank = (policy - reference)[0] - (policy - reference)[1]
    got = DiffusionDRO(margin=0.07).score(Evidence(policy, reference)).loss
    torch.testing.assert_close(got - 0.07, rank.clamp(min=-0.07))
    assert 0 < int((got == 0).sum()) < 64


@pytest.mark.parametrize(
    ("link", "alpha", "logit"),
    [
        ("reverse_kl", None, 2.0),
        ("forward_kl", None, math.e - 1 / math.e),
        ("js", None, 1.0),  # log s(1) - log s(-1)
        ("alpha", 0.5, 2 * (math.exp(0.5) - math.exp(-0.5))),
    ],
)
def test_f_dpo_by_hand(link: str, alpha: float | None, logit: float) -> None:
    score = FDPO(beta=20.0, link=link, alpha=alpha).score(evidence([0.4, 0.6], [0.5, 0.5]))
    assert score.logit.item() == pytest.approx(logit, rel=1e-12)
    assert score.loss.item() == pytest.approx(math.log1p(math.exp(-logit)), rel=1e-12)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("penalty", [0.3, 1.0, 4.0])
def test_f_dpo_is_the_papers_equation_in_ratios(link: str, penalty: float) -> None:
    """-log s(p f'(r^c) - p f'(r^r)) with f' from its table 1, in plain ratios r = e^u: no log space, no constants."""
    alpha = 0.3 if link == "alpha" else None
    derivative = {
        "reverse_kl": lambda r: r.log() + 1,
        "forward_kl": lambda r: -1 / r,
        "js": lambda r: (2 * r / (1 + r)).log(),
        "alpha": lambda r: (1 - r**-0.3) / 0.3,
    }[link]
    policy, reference = random()
    rewards = penalty * derivative((-(20.0 / 2) * (policy - reference) / penalty).exp())
    expected = -torch.sigmoid(rewards[0] - rewards[1]).log()
    got = FDPO(beta=20.0, link=link, alpha=alpha, penalty=penalty).score(Evidence(policy, reference)).loss
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_f_dpo_with_the_reverse_kl_is_diffusion_dpo_to_the_last_bit() -> None:
    policy, reference = (x.float() for x in random())
    results = []
    for objective in (DiffusionDPO(beta=70.0), FDPO(beta=70.0, link="reverse_kl", penalty=0.3)):
        leaf = policy.clone().requires_grad_()
        score = objective.score(Evidence(leaf, reference))
        score.loss.sum().backward()
        results.append((score.loss, score.logit, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("near", "end"), [(0.0, "reverse_kl"), (1.0, "forward_kl")])
def test_alpha_tends_to_the_two_kls(near: float, end: str) -> None:
    """Losses approach the limit's in proportion to the distance of alpha from it."""
    policy, reference = random()
    limit = FDPO(beta=20.0, link=end).score(Evidence(policy, reference)).loss
    apart = []
    for distance in (1e-2, 1e-3, 1e-4):
        objective = FDPO(beta=20.0, link="alpha", alpha=abs(near - distance))
        apart.append(float((objective.score(Evidence(policy, reference)).loss - limit).abs().max()))
    assert apart[0] / apart[1] == pytest.approx(10, rel=0.1)
    assert apart[1] / apart[2] == pytest.approx(10, rel=0.02)


def test_links_are_bounded_above_and_keep_a_slope_below() -> None:
    far = evidence([0.0, 0.0], [1e3, 0.0])  # u^c = 1e4
    for link, alpha, bound in (("forward_kl", None, 1.0), ("js", None, math.log(2)), ("alpha", 0.25, 4.0)):
        assert FDPO(beta=20.0, link=link, alpha=alpha).score(far).logit.item() == pytest.approx(bound)
    lost = evidence([1e3, 0.0], [0.0, 0.0])  # u^c = -1e4: e^1e4 has no float
    for link in LINKS:
        objective = FDPO(beta=20.0, link=link, alpha=0.5 if link == "alpha" else None)
        assert math.isfinite(objective.score(lost).loss.item())
        assert slopes(objective, lost)[0] > 0


def test_tangent_of_the_exponential() -> None:
    x = torch.tensor([-30.0, 0.0, 2.9, 3.0, 5.0], dtype=torch.float64)
    e3 = math.exp(3)
    expected = [math.expm1(-30), 0.0, math.expm1(2.9), e3 - 1, e3 - 1 + 2 * e3]
    assert tangent_expm1(x, 3.0).tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda y: tangent_expm1(y, 3.0), (x[[0, 1, 2, 4]].requires_grad_(),))


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_descent_makes_the_chosen_error_smaller_and_the_rejected_larger(objective: Any) -> None:
    policy, reference = random()
    leaf = policy.requires_grad_()
    (grad,) = torch.autograd.grad(objective.score(Evidence(leaf, reference)).loss.sum(), leaf)
    assert bool((grad[0] >= 0).all())
    assert bool((grad[1] <= 0).all())
    assert float(grad[0].sum()) > 0 > float(grad[1].sum())


@pytest.mark.parametrize("objective", [o for o in ALL if o != KTO(beta=20.0)], ids=str)
def test_gradients_are_those_of_finite_differences(objective: Any) -> None:
    """Of all but KTO around its reference point, which is held fixed on purpose."""
    policy, reference = random(16)
    assert torch.autograd.gradcheck(
        lambda p: objective.score(Evidence(p, reference)).loss, (policy.requires_grad_(),), atol=1e-6
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KTO(reference_point="batch"), "reference_point = 'batch'; allowed: pair, zero"),
        (lambda: KTO(lambda_desirable=0), "lambda_desirable = 0"),
        (lambda: DSODRO(margin=0), "margin = 0"),
        (lambda: DiffusionDRO(margin=-1), "margin = -1"),
        (lambda: FDPO(link="tv"), "link = 'tv'; allowed: reverse_kl"),
        (lambda: FDPO(link="alpha"), r"alpha = None: link alpha needs a value in \(0, 1\)"),
        (lambda: FDPO(link="alpha", alpha=1.0), r"alpha = 1.0: link alpha needs a value"),
        (lambda: FDPO(link="js", alpha=0.5), "only link alpha has this setting"),
    ],
)
def test_faulty_settings_are_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
