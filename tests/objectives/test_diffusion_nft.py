"""DiffusionNFT by hand, as the release computes it, and in velocities and images for every prediction type."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.engine.measure import measure_and_backward
from diffalign.objectives import DiffusionNFT
from diffalign.objectives.base import ask
from diffalign.sources.groups import GradedGroups, advantages
from diffalign.types import Evidence, Terms
from tests.toy import ToyModels, toy_batch, toy_models

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/nft.json").read_text())
OPTIMALITY = (0.0, 0.3, 0.5, 1.0)


def one(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).reshape(1, 1)


def test_by_hand() -> None:
    seen = Evidence(one(0.4), one(0.5), distance=one(0.04), terms=Terms(optimality=one(0.8)[0]))
    score = DiffusionNFT(weighting="none").score(seen)
    assert score.loss.tolist() == pytest.approx([0.456], rel=1e-12)
    weighted = DiffusionNFT().score(replace(seen, weight=one(4.0)[0])).loss  # .8 · √(4 · .4) + .2 · √(4 · .68)
    assert weighted.tolist() == pytest.approx([0.8 * 1.6**0.5 + 0.2 * 2.72**0.5], rel=1e-12)
    assert torch.equal(DiffusionNFT(weighting="none").score(replace(seen, terms=Terms())).loss, one(0.4)[0])  # r = 1


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['beta']}-{case['advantage']}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_release(case: dict[str, float], dtype: torch.dtype) -> None:
    old, moved = torch.tensor(case["old"], dtype=dtype), torch.tensor(case["moved"], dtype=dtype, requires_grad=True)
    r = torch.tensor([0.5 + max(-5.0, min(5.0, case["advantage"])) / 10], dtype=dtype)
    policy, reference, distance = (x.reshape(1, 1) for x in ((old + moved) ** 2, old**2, moved**2))
    t = torch.tensor([case["t"]], dtype=dtype)
    seen = Evidence(policy, reference, weight=t**2, terms=Terms(optimality=r), distance=distance)
    loss = DiffusionNFT(beta=case["beta"]).score(seen).loss.sum()
    (slope,) = torch.autograd.grad(loss, moved)
    # in float32, E₋ = 1.1 E_old − .1 E_θ + … keeps 1e-7 of its largest term, and the two slopes cancel at r = 1/2
    near = {"rel": 1e-9} if dtype == torch.float64 else {"rel": 1e-4, "abs": 1e-5}
    assert loss.item() == pytest.approx(case["loss"], **near)
    assert slope.item() == pytest.approx(case["slope"], **near)


@pytest.mark.parametrize("spread", ["round", "prompt"])
def test_the_releases_advantages(spread: Any) -> None:
    places, scores = torch.tensor(GOLDEN["places"]), torch.tensor(GOLDEN["scores"], dtype=torch.float64)
    assert advantages(places, scores, spread).tolist() == pytest.approx(GOLDEN["advantages"][spread], rel=1e-9)
    same = torch.full_like(scores, 0.7)
    assert GradedGroups("world").grade(places, same, spread).optimality.tolist() == [0.5] * 8


def restated(models: ToyModels, probe: Any, beta: float, weighted: bool) -> Tensor:
    """The paper's loss of each sample, in the velocity v = α ε − σ x_0, and the release's weights, in x̂_0."""
    x, t, cond = probe.xt[0], probe.t, probe.cond.flatten()
    bar = models.schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    a, s, kind = bar.sqrt(), (1 - bar).sqrt(), models.schedule.prediction_type

    def velocity(answer: Tensor) -> Tensor:
        if kind == "epsilon":
            return (answer - s * x) / a
        return (a * x - answer) / s if kind == "sample" else answer

    new, old, v = (velocity(y) for y in (models.net(x, t, cond), models.frozen(x, t, cond), probe.target[0]))
    loss = 0.0
    for r, answer in (
        (probe.terms.optimality, (1 - beta) * old + beta * new),
        (1 - probe.terms.optimality, (1 + beta) * old - beta * new),
    ):
        if weighted:
            error = (a * x - s * answer - (a * x - s * v)).square().mean((1, 2, 3))  # of x̂_0
            error = error / error.detach().sqrt()
        else:  # in the network's own space
            scale = {"epsilon": a, "sample": s, "v_prediction": torch.ones_like(a)}[kind]
            error = (scale * (answer - v)).square().mean((1, 2, 3))
        loss = loss + r * error / beta
    return loss


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "v_prediction zero", "sample zero"])
@pytest.mark.parametrize(("beta", "weighting"), [(1.0, "x0"), (0.1, "x0"), (0.7, "none")])
def test_loss_and_gradient_in_velocities(kind: str, beta: float, weighting: Any) -> None:
    name, _, zero = kind.partition(" ")
    models = toy_models(apart=0.2, prediction_type=name, rescale_betas_zero_snr=bool(zero))
    terms = Terms(optimality=torch.tensor(OPTIMALITY, dtype=torch.float64))
    batch, objective = replace(toy_batch(4), terms=terms), DiffusionNFT(beta, weighting)
    objective.check_schedule(models.schedule)
    probe = ask(objective, batch, models)
    if zero:  # the timestep without signal
        probe.t[0] = 999
        noise = torch.randn(1, 1, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x0 = batch.latents[:1, :1]
        probe.xt[:, :1] = models.schedule.add_noise(x0, noise, probe.t[:1].expand(1, 1))
        probe.target[:, :1] = models.schedule.target(x0, noise, probe.t[:1].expand(1, 1))
        probe = objective.weigh(probe, models.schedule)
    _, score = measure_and_backward(models, probe, objective.score)
    found = [p.grad.clone() for p in models.net.parameters()]
    expected = restated(models, probe, beta, weighting == "x0")
    torch.testing.assert_close(score.loss, expected.detach(), rtol=1e-9, atol=0)
    slopes = torch.autograd.grad(expected.mean(), list(models.net.parameters()))
    for one_, other in zip(found, slopes, strict=True):
        torch.testing.assert_close(one_, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


@pytest.mark.parametrize("weighting", ["x0", "none"])
def test_at_the_old_policy_the_slope_is_the_advantage(weighting: Any) -> None:
    """A = 2r − 1 times that of the denoising loss: nothing at r = 1/2, and the opposite for r and 1 − r."""
    slopes = []
    for r in (0.5, 0.2, 0.8):
        models = toy_models(prediction_type="v_prediction")
        batch = replace(toy_batch(1), terms=Terms(optimality=torch.tensor([r], dtype=torch.float64)))
        objective = DiffusionNFT(weighting=weighting)
        probe = ask(objective, batch, models)
        seen, _ = measure_and_backward(models, probe, objective.score)
        slopes.append([p.grad.clone() for p in models.net.parameters()])
        models.net.zero_grad()
        (models.net(probe.xt[0], probe.t, probe.cond.flatten()) - probe.target[0]).square().mean().backward()
        w = 1.0 if weighting == "none" else float((seen.weight / seen.policy[0]).sqrt())
        for slope, p in zip(slopes[-1], models.net.parameters(), strict=True):
            torch.testing.assert_close(slope, (2 * r - 1) * w * p.grad, rtol=1e-9, atol=1e-14)
    assert max(float(s.abs().max()) for s in slopes[1]) > 1e-4


def test_what_is_not_defined_is_refused() -> None:
    zero = toy_models(rescale_betas_zero_snr=True).schedule
    with pytest.raises(ValueError, match="a predicted noise says nothing about the image; use weighting: none"):
        DiffusionNFT().check_schedule(zero)
    DiffusionNFT(weighting="none").check_schedule(zero)
    for make, words in ((lambda: DiffusionNFT(beta=0.0), "beta = 0"), (lambda: DiffusionNFT(weighting="l1"), "'l1'")):
        with pytest.raises(ValueError, match=words):
            make()
    with pytest.raises(ValueError, match="diffusion_nft: this evidence has no distance"):
        DiffusionNFT().score(Evidence(one(0.4), one(0.5)))
