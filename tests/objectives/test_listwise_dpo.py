"""Diffusion-LPO's loss by hand, by the definition of the Plackett-Luce model, and as Diffusion-DPO at two images."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from mpmath import mp, mpf

from diffalign.engine.measure import measure, measure_and_backward
from diffalign.objectives import DiffusionDPO, ListwiseDPO
from diffalign.objectives.base import ask
from diffalign.types import Evidence, PairBatch
from tests.toy import single, toy_batch, toy_models


def toy_lists(lists: int, images: int, dtype: torch.dtype = torch.float64) -> PairBatch:
    """Ranked lists of random latents."""
    batch = toy_batch(lists, dtype)
    latents = torch.randn(images, lists, 4, 6, 6, generator=torch.Generator().manual_seed(5), dtype=dtype)
    embeds = batch.cond.prompt_embeds[:1].expand(images, -1, -1, -1)
    cond = replace(batch.cond, prompt_embeds=embeds)
    return PairBatch(latents=latents, cond=cond, keys=batch.keys)


def test_by_hand() -> None:
    policy = torch.tensor([0.4, 0.5, 0.5], dtype=torch.float64)[:, None]
    score = ListwiseDPO(beta=20.0).score(Evidence(policy, torch.full_like(policy, 0.5)))
    assert float(score.loss) == pytest.approx(math.log(1 + 2 / math.e) + math.log(2), rel=1e-12)
    assert float(score.logit) == pytest.approx(1.0)
    assert float(score.metrics["list/accuracy"]) == pytest.approx(2 / 3)  # equal rewards are not in order


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_list_of_two_is_dpo_in_every_bit(prediction: str) -> None:
    results = []
    for objective in (ListwiseDPO(beta=30.0), DiffusionDPO(beta=30.0)):
        models = toy_models(torch.float32, apart=0.1, prediction_type=prediction)
        probe = ask(objective, toy_batch(4, torch.float32), models)
        _, score = measure_and_backward(models, probe, objective.score)
        results.append((score, [p.grad for p in models.net.parameters()]))
    (one, ours), (two, theirs) = results
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(one.logit, two.logit)
    assert all(torch.equal(one.metrics[name], two.metrics[name]) for name in two.metrics)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("images", [3, 8])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_loss_and_slope_are_those_of_the_plackett_luce_likelihood(images: int, scale: float) -> None:
    """With 40 digits: log of the product of exp r_j / Σ_{k≥j} exp r_k, and its central difference."""
    policy = torch.rand(images, 1, generator=torch.Generator().manual_seed(images), dtype=torch.float64)
    reference = torch.full_like(policy, 0.5)
    loss, slope = scored(ListwiseDPO(beta=2 * scale), policy, reference)
    mp.dps = 40

    def exact(*errors: Any) -> Any:
        reward = [mpf(scale) * (mpf("0.5") - e) for e in errors]
        product = mpf(1)
        for j in range(images):
            product *= mp.exp(reward[j]) / mp.fsum(mp.exp(r) for r in reward[j:])
        return -mp.log(product)

    at = [mpf(float(x)) for x in policy]
    assert float(abs(loss - exact(*at)) / exact(*at)) <= 1e-9
    h = mpf(10) ** -12
    for j in range(images):
        moved = [[*at[:j], at[j] + step, *at[j + 1 :]] for step in (h, -h)]
        expected = (exact(*moved[0]) - exact(*moved[1])) / (2 * h)
        assert float(abs(slope[j] - expected)) <= 1e-9 * max(abs(float(expected)), 1.0)


def scored(objective: ListwiseDPO, policy: torch.Tensor, reference: torch.Tensor) -> tuple[float, list[float]]:
    policy = policy.clone().requires_grad_()
    loss = objective.score(Evidence(policy, reference)).loss.sum()
    return float(loss.detach()), torch.autograd.grad(loss, policy)[0].flatten().tolist()


def test_the_likelihoods_of_all_orders_sum_to_one_and_the_right_one_is_the_most_likely() -> None:
    errors = torch.tensor([0.1, 0.4, 0.5, 0.7], dtype=torch.float64)
    orders = torch.stack([errors[list(order)] for order in permutations(range(4))], dim=1)
    loss = ListwiseDPO(beta=4.0).score(Evidence(orders, torch.zeros_like(orders))).loss
    assert float(torch.exp(-loss).sum()) == pytest.approx(1.0, rel=1e-12)
    assert int(loss.argmin()) == 0
    assert int(loss.argmax()) == 23


@pytest.mark.parametrize("images", [2, 4, 8])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_equal_weights_start_at_log_m_factorial_with_a_gradient(images: int, prediction: str) -> None:
    models = toy_models(prediction_type=prediction)
    objective = ListwiseDPO()
    probe = ask(objective, toy_lists(3, images), models)
    assert probe.xt.shape[0] == images
    _, score = measure_and_backward(models, probe, objective.score)
    assert score.loss.tolist() == pytest.approx([math.log(math.factorial(images))] * 3, rel=1e-12)
    assert score.logit.tolist() == [0.0] * 3
    assert sum(float(p.grad.abs().sum()) for p in models.net.parameters()) > 0


def test_a_batch_of_lists_is_its_singletons() -> None:
    objective, batch, models = ListwiseDPO(beta=40.0), toy_lists(4, 5), toy_models(apart=0.05)
    whole = objective.score(measure(models, ask(objective, batch, models))).loss
    ones = [objective.score(measure(models, ask(objective, single(batch, i), models))).loss for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(ones), rtol=1e-9, atol=0)


def test_all_images_of_a_list_share_t_and_noise_and_a_turned_list_negates_the_logit() -> None:
    objective, models, batch = ListwiseDPO(beta=40.0), toy_models(apart=0.1), toy_lists(3, 4)
    probe = ask(objective, batch, models)
    noise = probe.target  # of an ε-network
    assert torch.equal(noise, noise[:1].expand_as(noise))
    seen = measure(models, probe)
    turned = replace(seen, policy=seen.policy.flip(0), reference=seen.reference.flip(0))  # type: ignore[union-attr]
    torch.testing.assert_close(objective.score(turned).logit, -objective.score(seen).logit, rtol=0, atol=0)
