"""Each loss by hand, at the start, with swapped sides, and the properties that all of them share."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from diffalign.engine.measure import measure
from diffalign.objectives import (
    DMPO,
    DSPO,
    IPO,
    OBJECTIVES,
    SFT,
    ConservativeDPO,
    DiffusionDPO,
    LinearDPO,
    MaPO,
    PolyDPO,
    RobustDPO,
    SePPO,
)
from diffalign.objectives.base import ask
from diffalign.objectives.mapo import bounded_likelihood
from diffalign.types import Evidence, PairBatch
from tests.toy import single, toy_batch, toy_models

ONE_SIDED = ("seppo",)  # its sides have different roles: a test of its own says what swapping does
OF_ONE_IMAGE = ("sft", "diffusion_nft")
PAIRWISE = [c for c in OBJECTIVES if c not in OF_ONE_IMAGE and c not in ONE_SIDED]
FOUND = ("inpo", "smpo", "inversion_dpo", "spo")  # their noise is found, not drawn: tests of their own
AGAINST_REFERENCE = [c for c in OBJECTIVES if OBJECTIVES[c].needs_reference]


def evidence(policy: list[float], reference: list[float] | None = None) -> Evidence:
    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)[:, None]

    return Evidence(column(policy), None if reference is None else column(reference))


def test_dpo_by_hand() -> None:
    score = DiffusionDPO(beta=20.0).score(evidence([0.4, 0.5], [0.5, 0.5]))
    assert float(score.logit) == pytest.approx(1.0)
    assert float(score.loss) == pytest.approx(math.log(1 + math.exp(-1)))
    assert float(score.metrics["rewards/chosen"]) == pytest.approx(1.0)
    assert float(score.metrics["rewards/rejected"]) == pytest.approx(0.0)


def test_label_noise_by_hand() -> None:
    seen = evidence([0.4, 0.5], [0.5, 0.5])
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    conservative = ConservativeDPO(beta=20.0, label_smoothing=0.2).score(seen)
    assert float(conservative.loss) == pytest.approx(0.8 * right + 0.2 * wrong)
    robust = RobustDPO(beta=20.0, label_smoothing=0.2).score(seen)
    assert float(robust.loss) == pytest.approx((0.8 * right - 0.2 * wrong) / 0.6)


def test_robust_loss_is_unbiased_under_label_noise() -> None:
    e, clean, flipped = 0.3, evidence([0.4, 0.7], [0.5, 0.5]), evidence([0.7, 0.4], [0.5, 0.5])
    robust = RobustDPO(beta=20.0, label_smoothing=e)
    expected = (1 - e) * robust.score(clean).loss + e * robust.score(flipped).loss
    torch.testing.assert_close(expected, DiffusionDPO(beta=20.0).score(clean).loss)


def test_conservative_minimum_is_where_the_paper_puts_it() -> None:
    h = torch.linspace(-6, 6, 2401, dtype=torch.float64)
    seen = Evidence(torch.stack([-h, torch.zeros_like(h)]), torch.zeros(2, len(h), dtype=torch.float64))
    loss = ConservativeDPO(beta=2.0, label_smoothing=0.1).score(seen).loss
    assert float(h[loss.argmin()]) == pytest.approx(math.log(0.9 / 0.1), abs=5e-3)


def test_no_smoothing_is_dpo() -> None:
    seen = evidence([0.42, 0.57], [0.5, 0.49])
    plain = DiffusionDPO(beta=30.0).score(seen).loss
    for cls in (ConservativeDPO, RobustDPO):
        torch.testing.assert_close(cls(beta=30.0, label_smoothing=0.0).score(seen).loss, plain)


def test_ipo_by_hand() -> None:
    assert float(IPO(tau=10.0).score(evidence([0.4, 0.5], [0.5, 0.5])).loss) == pytest.approx(0.0025)
    assert float(IPO(tau=5.0).score(evidence([0.4, 0.5], [0.5, 0.5])).loss) == pytest.approx(0.0)


def test_poly_dpo_by_hand() -> None:
    seen = evidence([0.4, 0.5], [0.5, 0.5])  # h = 1
    p = 1 / (1 + math.exp(-1))
    assert float(PolyDPO(beta=20.0, alpha=2.0).score(seen).loss) == pytest.approx(-math.log(p) + 2 * (1 - p), rel=1e-12)
    assert torch.equal(PolyDPO(beta=20.0, alpha=0.0).score(seen).loss, DiffusionDPO(beta=20.0).score(seen).loss)
    # below alpha = -1 the minimum is where p = -1 / alpha
    h = torch.linspace(-6, 6, 2401, dtype=torch.float64)
    loss = PolyDPO(beta=2.0, alpha=-2.0).score(Evidence(torch.stack([-h, 0 * h]), torch.zeros(2, len(h)).double())).loss
    assert float(h[loss.argmin()]) == pytest.approx(0.0, abs=5e-3)


@pytest.mark.parametrize("alpha", [1.0, -0.5, -1.0])
def test_poly_dpo_is_a_polynomial_in_the_error_of_the_label(alpha: float) -> None:
    """-log(1 - q) + alpha q with q = 1 - p, as a series in q; its slope in the chosen error is (b/2)(q + alpha p q)."""
    g = torch.Generator().manual_seed(4)
    policy, reference = (torch.rand(2, 32, generator=g, dtype=torch.float64) for _ in range(2))
    policy[0] = policy[0] / 4  # logits above 0, where the series converges fast
    objective, policy = PolyDPO(beta=8.0, alpha=alpha), policy.requires_grad_()
    found = objective.score(Evidence(policy, reference)).loss
    (slope,) = torch.autograd.grad(found.sum(), policy)
    loss = found.tolist()
    rows = torch.cat([policy.detach(), reference]).T.tolist()
    for i, (c, r, c0, r0) in enumerate(rows):
        q = 0.5 * (1 - math.tanh(2 * ((r - r0) - (c - c0))))  # 1 - sigma(h) with h = 4((r - r0) - (c - c0))
        if q < 0.7:
            series = sum(q**k / k for k in range(1, 160)) + alpha * q
            assert loss[i] == pytest.approx(series, rel=1e-9)
        assert float(slope[0, i]) == pytest.approx(4 * q * (1 + alpha * (1 - q)), rel=1e-9)
        assert float(slope[1, i]) == -float(slope[0, i])


@pytest.mark.parametrize(
    ("policy", "eta", "weight"),
    [
        ([0.4, 0.6], 0.001, 0.42),  # D^c - D^r = -.2 and beta = 2: 1/2 - .4 * .2
        ([0.6, 0.4], 0.001, 0.58),
        ([0.1, 2.9], 0.0, 0.0),  # a logit of 2.8, beyond 1.25: no weight, and no gradient
        ([0.1, 2.9], 0.1, 0.1),
        ([2.9, 0.1], 0.1, 0.9),
    ],
)
def test_linear_dpo_by_hand(policy: list[float], eta: float, weight: float) -> None:
    errors = torch.tensor(policy, dtype=torch.float64)[:, None].requires_grad_()
    loss = LinearDPO(beta=2.0, eta=eta).score(Evidence(errors, torch.full_like(errors, 0.5))).loss
    assert float(loss.detach()) == pytest.approx(weight * (policy[0] - policy[1]), rel=1e-12)
    (slope,) = torch.autograd.grad(loss.sum(), errors)
    assert slope.flatten().tolist() == pytest.approx([weight, -weight], rel=1e-12)


def test_linear_dpo_is_a_quadratic_utility_of_predictions() -> None:
    """Inside the bounds its gradient is that of u + .1 beta u^2 with u = D^c - D^r, halved: du (1/2 + .2 beta u)."""
    g = torch.Generator().manual_seed(5)
    answer, base, noise = (torch.randn(2, 8, 3, generator=g, dtype=torch.float64) for _ in range(3))
    answer = (base + 0.05 * answer).requires_grad_()
    policy, reference = ((x - noise).square().mean(-1) for x in (answer, base))
    score = LinearDPO(beta=0.5, eta=0.0).score(Evidence(policy, reference))
    (found,) = torch.autograd.grad(score.loss.sum(), answer, retain_graph=True)
    u = (answer * (answer - 2 * noise) - base * (base - 2 * noise)).sum(-1) / 3  # the squares of the noise cancel
    u = u[0] - u[1]
    assert float(u.detach().abs().max()) < 5  # .2 * .5 * u within 1/2
    (expected,) = torch.autograd.grad((u / 2 + 0.05 * u**2).sum(), answer)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_dmpo_by_hand() -> None:
    """The reverse KL divergence of two coins, and a minimum of 0 where the policy is as sure as the label."""
    coins = [torch.distributions.Bernoulli(torch.tensor(p).double()) for p in (1 / (1 + math.exp(-1)), 0.8)]
    loss = DMPO(beta=20.0, alpha=0.2).score(evidence([0.4, 0.5], [0.5, 0.5])).loss  # h = 1
    assert float(loss) == pytest.approx(float(torch.distributions.kl_divergence(*coins)), rel=1e-6)
    h = math.log(0.99 / 0.01)
    errors = torch.tensor([[-h / 10], [0.0]], dtype=torch.float64, requires_grad=True)
    loss = DMPO(beta=20.0).score(Evidence(errors, torch.zeros(2, 1).double())).loss
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-15)
    assert torch.autograd.grad(loss.sum(), errors)[0].flatten().tolist() == pytest.approx([0.0, 0.0], abs=1e-14)


def test_dmpo_weighs_neither_pairs_that_are_lost_nor_those_that_are_won() -> None:
    slopes = []
    for h in (-12.0, -1.0, 1.0, 12.0):
        errors = torch.tensor([[-h / 10], [0.0]], dtype=torch.float64, requires_grad=True)
        loss = DMPO(beta=20.0).score(Evidence(errors, torch.zeros(2, 1).double())).loss
        (slope,) = torch.autograd.grad(loss.sum(), errors)
        p, target = 1 / (1 + math.exp(-h)), math.log(0.99 / 0.01)
        assert float(slope[0]) == pytest.approx(-10 * p * (1 - p) * (h - target), rel=1e-9)
        slopes.append(abs(float(slope[0])))
    assert max(slopes[0], slopes[3]) < 0.01 * min(slopes[1], slopes[2])


def test_dspo_by_hand() -> None:
    seen = replace(evidence([0.4, 0.5], [0.5, 0.5]), distance=torch.tensor([[0.02], [9.0]], dtype=torch.float64))
    g = 1 / (1 + math.exp(0.05))
    expected = (1 - g) * 0.4 + g * 0.5 - g * (1 - g) * 0.02
    assert float(DSPO(beta=1.0).score(seen).loss) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="no distance between policy and reference"):
        DSPO().score(evidence([0.4, 0.5], [0.5, 0.5]))


def test_mapo_by_hand() -> None:
    score = MaPO(beta=1.0, num_train_timesteps=1).score(evidence([0.0, 1e4]))
    assert float(score.loss) == pytest.approx(math.log(1 + math.exp(-1)))


@pytest.mark.parametrize(
    ("policy", "flip", "logit", "flipped"),
    [
        ([0.4, 0.3], "anchor", -1.0, 0.0),  # better at the winner: D = (-.1, -.2), DPO
        ([0.6, 0.3], "anchor", 1.0, 1.0),  # worse at it: D = (.1, -.2), f = -1, -10 (.1 - .2)
        ([0.5, 0.3], "anchor", 0.0, 1.0),  # neither: the winner alone
        ([0.6, 0.3], "indicator", -1.0, 1.0),  # f = 0, -10 (.1)
        ([0.4, 0.3], "indicator", -1.0, 0.0),
        ([0.6, 0.3], "none", -3.0, 0.0),  # -10 (.1 + .2)
    ],
)
def test_seppo_by_hand(policy: list[float], flip: str, logit: float, flipped: float) -> None:
    score = SePPO(beta=20.0, flip=flip).score(evidence(policy, [0.5, 0.5]))
    assert float(score.logit) == pytest.approx(logit)
    assert float(score.loss) == pytest.approx(math.log(1 + math.exp(-logit)))
    assert float(score.metrics["flip_rate"]) == flipped
    assert float(score.metrics["rewards/rejected"]) == pytest.approx(2.0)  # before the flip


def test_seppo_without_a_flip_is_dpo_and_the_flip_carries_no_gradient() -> None:
    torch.manual_seed(0)
    policy, reference = torch.rand(2, 16, requires_grad=True), torch.rand(2, 16)

    def gradient(objective: object) -> torch.Tensor:
        return torch.autograd.grad(objective.score(Evidence(policy, reference)).loss.sum(), policy)[0]

    seen = Evidence(policy.detach(), reference)
    assert torch.equal(SePPO(beta=3.0, flip="none").score(seen).loss, DiffusionDPO(beta=3.0).score(seen).loss)
    assert torch.equal(gradient(SePPO(beta=3.0, flip="none")), gradient(DiffusionDPO(beta=3.0)))
    # the slopes of -log s(z), z = -(b/2)(D^c - f D^r): s(-z) b/2 on the winner and -f of that on the other side
    worse = policy[0] > reference[0]
    slope = gradient(SePPO(beta=3.0))
    torch.testing.assert_close(slope[1], torch.where(worse, slope[0], -slope[0]))
    assert 0 < int(worse.sum()) < 16


def test_seppo_swapped_negates_only_without_a_flip() -> None:
    seen, swapped = evidence([0.6, 0.3], [0.5, 0.5]), evidence([0.3, 0.6], [0.5, 0.5])
    plain = SePPO(beta=20.0, flip="none")
    assert float(plain.score(swapped).logit) == -float(plain.score(seen).logit)
    assert float(SePPO(beta=20.0).score(swapped).logit) == pytest.approx(3.0)  # the winner got better: DPO
    assert float(SePPO(beta=20.0).score(seen).logit) == pytest.approx(1.0)


def test_sft_is_the_chosen_error() -> None:
    assert float(SFT().score(evidence([0.3, 9.0])).loss) == pytest.approx(0.3)


def test_bounded_likelihood_against_mpmath_style_series_and_limits() -> None:
    x = torch.tensor([0.0, 1e-12, 1e-4, 0.5, 30.0, 800.0], dtype=torch.float64, requires_grad=True)
    q = bounded_likelihood(x)
    expected = [1.0, 1 - 0.5e-12, 1 - 0.5e-4 + 1e-8 / 12, 0.5 / math.expm1(0.5), 30 / math.expm1(30), 0.0]
    assert q.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-300)
    (slope,) = torch.autograd.grad(q.sum(), x)
    assert torch.isfinite(slope).all()
    assert float(slope[0]) == pytest.approx(-0.5)
    assert float(slope[1]) == pytest.approx(-0.5, abs=1e-3)
    q32 = bounded_likelihood(torch.tensor([0.0, 1e-30, 1e-3, 200.0]))
    assert q32.tolist() == pytest.approx([1.0, 1.0, 0.9995001, 0.0], abs=1e-7)


def test_bounded_likelihood_gradient() -> None:
    x = torch.rand(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bounded_likelihood, (x * 5,))


@pytest.mark.parametrize("name", AGAINST_REFERENCE)
def test_equal_weights_start(name: str) -> None:
    """At the reference: log 2 to the last bit (or the objective's own start), and a gradient that is not zero."""
    objective, models = OBJECTIVES[name](), toy_models(torch.float32)
    seen = measure(models, ask(objective, toy_batch(4, torch.float32), models))
    score = objective.score(seen)
    own = {
        "ipo": lambda: (torch.full((4,), 1 / (2 * objective.tau))) ** 2,
        "poly_dpo": lambda: torch.full((4,), 2.0).log() + objective.alpha / 2,
        "linear_dpo": lambda: (seen.policy[0] - seen.policy[1]) / 2,
        "dspo": lambda: seen.policy[0],
        "dmpo": lambda: torch.full((4,), 0.5 * math.log(0.25 / (0.99 * 0.01))),
        "kto": lambda: torch.full((4,), (objective.lambda_desirable + objective.lambda_undesirable) / 4),
        "dso_dro": lambda: seen.policy[0] - seen.policy[1],
        "diffusion_dro": lambda: torch.full((4,), objective.margin),
        "diffusion_nft": lambda: (seen.weight * seen.policy[0]).sqrt(),
    }
    expected = own[name]() if name in own else torch.full((4,), 2.0).log()
    if name in ("ipo", "dmpo", "dspo", "diffusion_nft"):  # not exact in float32
        torch.testing.assert_close(score.loss, expected, rtol=1e-6, atol=0)
    else:
        assert torch.equal(score.loss, expected)
    assert score.logit is None if name in OF_ONE_IMAGE else score.logit.tolist() == [0.0] * 4
    score.loss.mean().backward()
    assert sum(float(p.grad.abs().sum()) for p in models.net.parameters()) > 0


@pytest.mark.parametrize("name", PAIRWISE)
def test_swapped_sides_negate_the_margin(name: str) -> None:
    objective, models = OBJECTIVES[name](), toy_models(apart=0.1)
    seen = measure(models, ask(objective, toy_batch(), models))
    reference = None if seen.reference is None else seen.reference.flip(0)
    swapped = replace(seen, policy=seen.policy.flip(0), reference=reference)
    torch.testing.assert_close(objective.score(swapped).logit, -objective.score(seen).logit, rtol=0, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batch_is_its_singletons(name: str) -> None:
    """Losses one by one, and the gradient of the batch mean is the mean of the singletons' gradients."""
    objective, batch = OBJECTIVES[name](), toy_batch(4)

    def run(part: PairBatch) -> tuple[list[float], list[torch.Tensor]]:
        models = toy_models(apart=0.02)
        loss = objective.score(measure(models, ask(objective, part, models))).loss
        loss.mean().backward()
        return loss.tolist(), [p.grad for p in models.net.parameters()]

    together, grads = run(batch)
    alone = [run(single(batch, i)) for i in range(4)]
    assert together == pytest.approx([loss for (losses, _) in alone for loss in losses], rel=1e-12)
    for i, grad in enumerate(grads):
        mean = torch.stack([g[i] for _, g in alone]).mean(0)
        torch.testing.assert_close(grad, mean, rtol=1e-9, atol=1e-9 * float(grad.abs().max()))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_probe_is_repeatable(name: str) -> None:
    objective, models, batch = OBJECTIVES[name](), toy_models(), toy_batch(3)
    probe, again = objective.probe(batch, models), objective.probe(batch, models)
    assert torch.equal(probe.xt, again.xt)
    assert torch.equal(probe.t, again.t)
    assert probe.t.dtype == torch.int64
    assert not probe.xt.requires_grad


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in FOUND])
def test_drawn_noise_is_shared_by_the_sides(name: str) -> None:
    objective, models, batch = OBJECTIVES[name](), toy_models(), toy_batch(64)
    probe = objective.probe(batch, models)
    if probe.xt.shape[0] == 2:
        assert torch.equal(probe.target[0], probe.target[1])
    assert len(set(probe.t.tolist())) > 50
    t = probe.t.expand(probe.xt.shape[:2])
    torch.testing.assert_close(probe.xt, models.schedule.add_noise(batch.latents[: len(probe.xt)], probe.target, t))


def test_turbo_timesteps() -> None:
    models = toy_models()
    probe = DiffusionDPO(timesteps=(249, 499, 749, 999)).probe(toy_batch(64), models)
    assert set(probe.t.tolist()) == {249, 499, 749, 999}


def test_objectives_are_frozen_and_every_field_has_a_default() -> None:
    for cls in OBJECTIVES.values():
        objective = cls()
        assert cls.paper
        for f in fields(objective):
            with pytest.raises(FrozenInstanceError):
                setattr(objective, f.name, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DiffusionDPO(beta=0), "beta = 0"),
        (lambda: DiffusionDPO(beta=float("inf")), "beta = inf"),
        (lambda: DiffusionDPO(timesteps=()), "at least one"),
        (lambda: RobustDPO(label_smoothing=0.5), "label_smoothing = 0.5"),
        (lambda: IPO(tau=-1), "tau = -1"),
        (lambda: LinearDPO(eta=0.5), "eta = 0.5"),
        (lambda: DMPO(alpha=0.0), "alpha = 0"),
        (lambda: PolyDPO(alpha=math.nan), "alpha = nan"),
        (lambda: MaPO(snr=0), "snr = 0"),
        (lambda: SePPO(flip="both"), "flip = 'both'"),
    ],
)
def test_faulty_settings_are_named(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_points_are_drawn_where_an_objective_says_so(name: str) -> None:
    """Cached errors rest on this: the points of a batch are the same whatever the networks are, and none is asked."""
    objective = OBJECTIVES[name]()
    assert (objective.drawn is not None) == (name not in FOUND)
    if objective.drawn is None:
        return
    one, other = toy_models(), toy_models(apart=0.5)
    first, second = objective.probe(toy_batch(3), one), objective.probe(toy_batch(3), other)
    for field in ("xt", "t", "target"):
        assert torch.equal(getattr(first, field), getattr(second, field))
    assert one.policy_calls == one.reference_calls == 0
    plain = DiffusionDPO().probe(toy_batch(3), one)
    if first.xt.shape[0] == 2:
        assert objective.drawn == DiffusionDPO().drawn  # so what was cached for the one serves the other
    assert torch.equal(first.xt, plain.xt[: len(first.xt)])
