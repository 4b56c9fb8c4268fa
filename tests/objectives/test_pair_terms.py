"""Weight, margin and mask of a pair: every objective applies them, or refuses them with a reason."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.engine.measure import measure, measure_and_backward
from diffalign.objectives import OBJECTIVES, DiffusionDPO, InversionDPO
from diffalign.objectives.base import ask, require_terms
from diffalign.types import Evidence, PairBatch, Probe, Score, Terms
from tests.toy import single, toy_batch, toy_models

TAKES_MARGIN = [name for name, cls in OBJECTIVES.items() if getattr(cls, "takes_margin", False)]
TAKES_SIGNS = [name for name, cls in OBJECTIVES.items() if getattr(cls, "takes_signs", False)]


def terms(batch: PairBatch, weight: float = 1.0, margin: float = 0.0, mask: Tensor | float = 1.0) -> PairBatch:
    n, (h, w) = batch.pairs, batch.latents.shape[-2:]
    like: dict[str, Any] = {"dtype": batch.latents.dtype}
    return with_terms(
        batch,
        weight=torch.full((n,), weight, **like),
        margin=torch.full((n,), margin, **like),
        mask=torch.full((n, h, w), mask, **like) if isinstance(mask, float) else mask.expand(n, h, w),
    )


def with_terms(batch: PairBatch, **changed: Tensor | None) -> PairBatch:
    return replace(batch, terms=replace(batch.terms, **changed))


def step(objective: Any, batch: PairBatch, **change: Any) -> tuple[Evidence, Score, list[Tensor]]:
    """A step's errors, losses and gradients."""
    models = toy_models(batch.latents.dtype, apart=0.05)
    probe = replace(ask(objective, batch, models), **change)
    evidence, score = measure_and_backward(models, probe, objective.score)
    return evidence, score, [p.grad for p in models.net.parameters()]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_neutral_terms_change_no_bit(name: str) -> None:
    objective, batch = OBJECTIVES[name](), toy_batch(4, torch.float32)
    neutral = terms(batch)
    if name not in TAKES_MARGIN:
        neutral = with_terms(neutral, margin=None)
    _, plain, expected = step(objective, batch)
    _, score, grads = step(objective, neutral)
    assert torch.equal(score.loss, plain.loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert float(grads[0].abs().sum()) > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_weight_multiplies_the_loss_and_its_gradient(name: str) -> None:
    objective, batch = OBJECTIVES[name](), toy_batch(3)
    weights = torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64)
    _, plain, _ = step(objective, batch)
    _, score, grads = step(objective, with_terms(batch, weight=weights))
    torch.testing.assert_close(score.loss, weights * plain.loss, rtol=1e-12, atol=0)
    alone = [step(objective, single(batch, i))[2] for i in range(3)]
    for i, grad in enumerate(grads):
        expected = sum(w * g[i] for w, g in zip(weights.tolist(), alone, strict=True)) / 3
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9 * float(grad.abs().max()))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batch_is_its_singletons_with_terms(name: str) -> None:
    objective, g = OBJECTIVES[name](), torch.Generator().manual_seed(1)
    batch = with_terms(
        toy_batch(4),
        weight=torch.rand(4, generator=g, dtype=torch.float64),
        margin=torch.randn(4, generator=g, dtype=torch.float64) if name in TAKES_MARGIN else None,
        mask=torch.rand(4, 6, 6, generator=g, dtype=torch.float64),
    )
    together = step(objective, batch)[1].loss.tolist()
    assert together == pytest.approx([float(step(objective, single(batch, i))[1].loss) for i in range(4)], rel=1e-12)


def test_margin_by_hand() -> None:
    """E_policy = (.4, .5), E_reference = (.5, .5), beta = 20: logit 1, and log(1 + e^-(1 - 3)) with a margin of 3."""
    errors = (torch.tensor([[0.4], [0.5]]).double(), torch.tensor([[0.5], [0.5]]).double())
    score = DiffusionDPO(beta=20.0).score(Evidence(*errors, terms=Terms(margin=torch.tensor([3.0]).double())))
    assert score.loss.item() == pytest.approx(math.log1p(math.exp(2)))
    assert score.logit is not None
    assert score.logit.item() == pytest.approx(1.0)  # what the policy says, not what is asked of it


@pytest.mark.parametrize("name", TAKES_MARGIN)
def test_a_margin_is_subtracted_from_the_logit(name: str) -> None:
    objective, margin = OBJECTIVES[name](), 0.7
    batch = toy_batch(4)
    seen, score, _ = step(objective, terms(batch, margin=margin))
    assert score.logit is not None
    torch.testing.assert_close(score.logit, step(objective, batch)[1].logit)
    x = score.logit - margin
    right, wrong = torch.log1p((-x).exp()), torch.log1p(x.exp())
    right = torch.where(x < -700, -x, right)
    expected = {
        "cdpo": lambda: 0.9 * right + 0.1 * wrong,
        "robust_dpo": lambda: (0.9 * right - 0.1 * wrong) / 0.8,
        "poly_dpo": lambda: right + 1 / (1 + x.exp()),
        "dmpo": lambda: torch.distributions.kl_divergence(
            torch.distributions.Bernoulli(logits=x),
            torch.distributions.Bernoulli(torch.tensor(0.99, dtype=x.dtype)),
        ),
        "mapo": lambda: seen.policy[0] + 0.1 * right,
    }.get(name, lambda: right)()
    torch.testing.assert_close(score.loss, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in TAKES_MARGIN])
def test_an_objective_without_a_logit_refuses_margins(name: str) -> None:
    with pytest.raises(ValueError, match=rf"margin for each pair, and {name} has no log σ"):
        ask(OBJECTIVES[name](), terms(toy_batch()), toy_models())


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in TAKES_SIGNS])
def test_an_objective_that_is_no_difference_refuses_negative_masks(name: str) -> None:
    with pytest.raises(ValueError, match=rf"swaps the sides of a part of the image, and the loss of {name}"):
        require_terms(OBJECTIVES[name](), margin=False, signs=True)


def test_which_objectives_take_what() -> None:
    without_margin = {"sft", "kto", "ipo", "linear_dpo", "dspo", "dso_dro", "diffusion_dro"}
    assert without_margin | {"diffusion_nft", "listwise_dpo"} == OBJECTIVES.keys() - set(TAKES_MARGIN)
    without_signs = {"sft", "mapo", "kto", "dspo", "dso_dro", "f_dpo", "seppo"}
    assert without_signs | {"diffusion_nft", "listwise_dpo"} == OBJECTIVES.keys() - set(TAKES_SIGNS)


def test_masked_errors_by_hand() -> None:
    """Squares 1, 4, 9, 16 have the mean 7.5; under a mask 1, 0, -1, .5 it is (1 + 0 - 9 + 8) / 4 = 0."""
    residual = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64).expand(2, 1, 1, 2, 2)
    probe = Probe(residual, torch.zeros(1, dtype=torch.int64), torch.zeros_like(residual), toy_batch(1).cond)
    models = toy_models()
    models.policy = models.reference = lambda xt, t, cond: xt  # type: ignore[method-assign]
    assert measure(models, probe).policy.tolist() == [[7.5], [7.5]]
    mask = torch.tensor([[[1.0, 0.0], [-1.0, 0.5]]])
    masked = measure(models, replace(probe, terms=Terms(mask=mask)))
    assert masked.policy.tolist() == [[0.0], [0.0]]
    assert masked.reference.tolist() == [[0.0], [0.0]]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_where_the_mask_is_zero_nothing_counts(name: str) -> None:
    """Other targets there: the same losses and gradients to the last bit; elsewhere: others."""
    objective, batch = OBJECTIVES[name](), toy_batch(3)
    mask = torch.ones(6, 6, dtype=torch.float64)
    mask[:3, 2:] = 0.0
    batch = with_terms(terms(batch, mask=mask), margin=None)
    target = ask(objective, batch, toy_models(apart=0.05)).target
    inside, outside = target.clone(), target.clone()
    inside[..., :3, 2:] += 1.0
    outside[..., 3:, :] += 1.0
    _, expected, grads = step(objective, batch, target=target)
    _, same, same_grads = step(objective, batch, target=inside)
    _, other, _ = step(objective, batch, target=outside)
    assert torch.equal(same.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(same_grads, grads, strict=True))
    assert not torch.equal(other.loss, expected.loss)


@pytest.mark.parametrize("name", TAKES_SIGNS)
def test_a_mask_of_minus_one_is_the_pair_with_its_sides_swapped(name: str) -> None:
    objective, batch = OBJECTIVES[name](), toy_batch(4)
    seen, plain, _ = step(objective, batch)
    reference = None if seen.reference is None else seen.reference.flip(0)
    swapped = objective.score(replace(seen, policy=seen.policy.flip(0), reference=reference))
    _, score, _ = step(objective, with_terms(terms(batch, mask=-1.0), margin=None))
    torch.testing.assert_close(score.logit, -plain.logit, rtol=1e-12, atol=1e-15)  # type: ignore[operator]
    torch.testing.assert_close(score.loss, swapped.loss, rtol=1e-12, atol=1e-15)


def test_densedpos_sum_over_places() -> None:
    """-log s(-(b/2) sum over places of l (D^c - D^r) / (c h w)), from predictions, place by place."""
    objective, batch, models = DiffusionDPO(beta=50.0), toy_batch(2), toy_models(apart=0.1)
    label = torch.randint(-1, 2, (2, 6, 6), generator=torch.Generator().manual_seed(3)).double()
    probe = ask(objective, with_terms(batch, mask=label), models)
    got = objective.score(measure(models, probe)).loss
    for i in range(2):
        total = 0.0
        for side, sign in ((0, 1), (1, -1)):
            cond = batch.cond.select(side=slice(side, side + 1), pair=slice(i, i + 1)).flatten()
            x, tau = probe.xt[side, i : i + 1], probe.target[side, i]
            theta, ref = (net(x, probe.t[i : i + 1], cond)[0] for net in (models.policy, models.reference))
            d = ((theta - tau) ** 2 - (ref - tau) ** 2).sum(0)  # over channels, "h w"
            total += sign * (label[i] * d).sum().item() / tau.numel()
        assert got[i].item() == pytest.approx(math.log1p(math.exp(25.0 * total)), rel=1e-9)


def test_terms_go_the_two_passes_as_they_go_one() -> None:
    objective = InversionDPO(steps=5, points_per_forward=2)
    g = torch.Generator().manual_seed(2)
    batch = with_terms(
        toy_batch(3),
        weight=torch.rand(3, generator=g, dtype=torch.float64),
        margin=torch.rand(3, generator=g, dtype=torch.float64),
        mask=2 * torch.rand(3, 6, 6, generator=g, dtype=torch.float64) - 1,
    )
    _, direct, expected = step(objective, batch, points_per_forward=None)
    _, chunked, grads = step(objective, batch)
    torch.testing.assert_close(chunked.loss, direct.loss)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_mask_of_another_size_is_refused() -> None:
    size = r"mask of shape \(4, 6, 5\): give masks of the latents' size, \(pair, h, w\) = \(4, 6, 6\)"
    with pytest.raises(ValueError, match=size):
        ask(DiffusionDPO(), with_terms(toy_batch(), mask=torch.ones(4, 6, 5)), toy_models())


def test_terms_follow_their_pairs() -> None:
    batch = with_terms(
        toy_batch(3), weight=torch.arange(3.0), margin=torch.arange(3.0), mask=torch.arange(3.0)[:, None, None]
    )
    for chosen in (batch.select(pair=slice(1, 3)), batch.to("cpu").select(pair=slice(1, 3))):
        part = chosen.terms
        assert part.weight is not None
        assert part.margin is not None
        assert part.mask is not None
        assert part.weight.tolist() == part.margin.tolist() == part.mask.flatten().tolist() == [1.0, 2.0]
    moved = batch.to("meta").terms
    assert {x.device.type for x in (moved.weight, moved.margin, moved.mask) if x is not None} == {"meta"}
