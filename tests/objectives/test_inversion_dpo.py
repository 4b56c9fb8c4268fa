"""Inversion-DPO alone: its points and weights, its cost in forwards and memory, the source of its gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffalign.engine.measure import Models, measure, measure_and_backward
from diffalign.models.loading.base import load_base
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.reference import FrozenCopy
from diffalign.objectives.inversion_dpo import InversionDPO
from diffalign.types import Conditioning, Evidence, PairBatch, Probe, Transitions
from tests.objectives.test_inversion_objectives import OBJECTIVES, Retold, Spy, as_released
from tests.toy import ToyModels, toy_batch, toy_models


def test_inversion_dpo_by_hand() -> None:
    """S = mean over two points of w·d: chosen (.1·1 + .05·2)/2 = .1, rejected 0."""
    d = torch.tensor([[[0.1, 0.05]], [[0.0, 0.0]]], dtype=torch.float64)
    evidence = Evidence(d, torch.zeros_like(d), weight=torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    for form, logit in (("released", 1.0), ("released_flipped", -1.0), ("residual", -1.0)):
        score = as_released(beta=20.0, form=form).score(evidence)
        assert float(score.logit) == pytest.approx(logit)
        assert float(score.loss) == pytest.approx(math.log(1 + math.exp(-logit)))


def test_points_drawn_are_unbiased_for_the_sum() -> None:
    """Over all visits the mean of the drawn points' errors is the mean over the grid, and every pair draws its own."""
    every, some = as_released(steps=12), as_released(steps=12, points_per_step=3)
    keys = torch.arange(4000)
    assert every.visited(keys)[7].tolist() == list(range(12))
    points = some.visited(keys)
    assert bool((points.diff(dim=1) > 0).all())
    assert torch.equal(points[5:6], some.visited(keys[5:6]))
    value = torch.arange(12, dtype=torch.float64) ** 2
    drawn = value[points].mean(1)
    assert float(drawn.mean()) == pytest.approx(float(value.mean()), abs=4 * float(drawn.std()) / 4000**0.5)


def test_some_points_are_those_of_the_whole_trajectory() -> None:
    models, batch = toy_models(apart=0.1), toy_batch(3)
    whole = as_released(steps=8).probe(batch, models)
    objective = as_released(steps=8, points_per_step=3)
    probe, points = objective.probe(batch, models), objective.visited(batch.keys)
    for pair in range(3):
        torch.testing.assert_close(probe.xt[:, pair], whole.xt[:, pair, points[pair]])
        torch.testing.assert_close(probe.target[:, pair], whole.target[:, pair, points[pair]])
        assert torch.equal(probe.t[pair], whole.t[pair, points[pair]])
        torch.testing.assert_close(probe.weight[pair], whole.weight[pair, points[pair]])


def test_released_deviation_is_measured_at_the_cleaner_latent_and_residual_at_the_noisier() -> None:
    models, batch = toy_models(apart=0.1), toy_batch(2)
    released = as_released(steps=5, form="released").probe(batch, models)
    residual = as_released(steps=5).probe(batch, models)
    assert torch.equal(released.xt[:, :, 0], batch.latents)
    torch.testing.assert_close(residual.xt[:, :, :-1], released.xt[:, :, 1:])
    assert torch.equal(residual.t, released.t)
    assert residual.t[0].tolist() == [199, 399, 599, 799, 999]
    torch.testing.assert_close(residual.target, released.target)  # the same noise, asked for at the other end
    assert not released.needs_reference


def test_weights_and_their_normalisation() -> None:
    models, batch = toy_models(), toy_batch(2)
    alpha_bar = models.schedule.alphas_cumprod[[199, 399, 599, 799, 999]]
    plain = as_released(steps=5).probe(batch, models).weight
    torch.testing.assert_close(plain[0], 1 / (2 * alpha_bar))
    normalised = as_released(steps=5, normalise=True, points_per_step=2).probe(batch, models)
    mean = (1 / (2 * alpha_bar)).mean()
    torch.testing.assert_close(normalised.weight, 1 / (2 * models.schedule.alpha_bar(normalised.t)) / mean)
    assert as_released(steps=5, weighting="uniform").probe(batch, models).weight is None


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("form", ["residual", "released"])
def test_inversion_dpo_is_the_same_loss_for_every_prediction_type(prediction_type: str, form: str) -> None:
    batch, objective = toy_batch(3), as_released(beta=50.0, steps=6, form=form)
    toy = toy_models(apart=0.02)
    other = Retold(toy, prediction_type)
    expected = objective.score(measure(toy, objective.probe(batch, toy)))
    got = objective.score(measure(other, objective.probe(batch, other)))
    torch.testing.assert_close(got.logit, expected.logit, rtol=1e-7, atol=1e-10)


def cost(objective: InversionDPO, pairs: int = 4) -> dict[str, int]:
    spy = Spy(toy_models())
    probe = objective.probe(toy_batch(pairs), spy)
    measure_and_backward(spy, probe, objective.score)
    return spy.rows


def test_inversion_dpo_costs_its_trajectory_and_each_point_twice() -> None:
    """Two images: N of the reference to invert, N for its errors (residual), 2N of the policy in two passes."""
    n = 2 * 4 * 6
    assert cost(as_released(steps=6, guidance=1.0)) == {"policy": 2 * n, "reference": 2 * n}
    assert cost(as_released(steps=6, guidance=2.0)) == {"policy": 4 * n, "reference": 4 * n}
    direct = as_released(steps=6, guidance=1.0, points_per_forward=None)
    assert cost(direct) == {"policy": n, "reference": 2 * n}
    assert cost(replace(direct, substeps=3)) == {"policy": n, "reference": 3 * n + n}
    assert cost(replace(direct, form="released")) == {"policy": n, "reference": n}
    assert cost(replace(direct, form="released", trajectory="policy")) == {"policy": 2 * n, "reference": n}


def test_drawn_points_cost_no_step_beyond_the_last() -> None:
    objective = as_released(steps=6, guidance=1.0, points_per_step=1)
    last = objective.visited(toy_batch(4).keys).max(1).values + 1
    assert cost(objective) == {"policy": 2 * 4, "reference": 2 * int(last.sum()) + 2 * 4}


def peak_saved(objective: InversionDPO, models: Models | None = None, batch: PairBatch | None = None) -> int:
    """Bytes kept for backward at the worst moment of a step: deterministic, and the same on every machine."""
    models, kept, peak = models or toy_models(torch.float32), 0, 0
    batch = toy_batch(2, torch.float32) if batch is None else batch

    def pack(x: Tensor) -> Tensor:
        nonlocal kept, peak
        kept += x.numel() * x.element_size()
        peak = max(peak, kept)
        return x

    def released(loss: Tensor) -> None:
        nonlocal kept
        loss.backward()
        kept = 0

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        probe = objective.probe(batch, models)
        measure_and_backward(models, probe, objective.score, backward=released)
    return peak


@pytest.mark.parametrize("form", ["residual", "released"])
def test_eighty_points_take_the_memory_of_eight(form: str) -> None:
    many, few = (peak_saved(as_released(steps=n, form=form)) for n in (80, 8))
    assert many <= 1.05 * few
    assert peak_saved(as_released(steps=80, form=form, points_per_forward=None)) > 5 * many


def test_eighty_points_of_a_unet_take_the_memory_of_eight(tiny_sd: Path) -> None:
    """Full tuning of a small SD-structured UNet, guided: 160 forwards with grad, one point's activations."""
    base = load_base(str(tiny_sd), vae_and_text=False)
    unet = base.unet.requires_grad_(True)
    models = Networks(unet, family=base.family, schedule=base.schedule, reference=FrozenCopy(unet))
    g = torch.Generator().manual_seed(0)
    dim = unet.config.cross_attention_dim
    text, null = (Conditioning(torch.randn(1, 1, 4, dim, generator=g).expand(2, -1, -1, -1)) for _ in range(2))
    latents = torch.randn(2, 1, 4, 8, 8, generator=g)
    batch = PairBatch(latents, text, torch.tensor([1]), uncond=null)
    many, few = (peak_saved(as_released(steps=n), models, batch) for n in (80, 8))
    assert few > 0
    assert many <= 1.05 * few


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if isinstance(OBJECTIVES[n], InversionDPO)])
def test_two_passes_give_the_direct_gradient(name: str) -> None:
    objective, batch = OBJECTIVES[name], toy_batch(3)

    def gradients(points: int | None) -> list[Tensor]:
        models = toy_models(apart=0.02)
        probe = replace(objective.probe(batch, models), points_per_forward=points)
        measure_and_backward(models, probe, objective.score)
        return [p.grad for p in models.net.parameters()]

    for direct, chunked in zip(gradients(None), gradients(1), strict=True):
        torch.testing.assert_close(chunked, direct, rtol=1e-9, atol=1e-12)


def test_inversion_dpo_needs_a_null_prompt_to_guide_and_finite_weights() -> None:
    assert InversionDPO(guidance=2.0).needs_uncond
    assert not as_released(guidance=1.0).needs_uncond
    with pytest.raises(ValueError, match=r"PairBatch\.uncond"):
        as_released().probe(replace(toy_batch(), uncond=None), toy_models())
    with pytest.raises(ValueError, match="weighting: uniform"):
        as_released(guidance=1.0).probe(toy_batch(), toy_models(rescale_betas_zero_snr=True))
    velocity = toy_models(rescale_betas_zero_snr=True, prediction_type="v_prediction", apart=0.05)
    objective = as_released(guidance=1.0, steps=5)
    score = objective.score(measure(velocity, objective.probe(toy_batch(), velocity)))
    assert bool(torch.isfinite(score.loss).all())


def test_probe_type_of_points() -> None:
    probe: Probe = as_released(steps=4, guidance=1.0).probe(toy_batch(2), toy_models())
    assert probe.points == 4
    assert probe.xt.shape == (2, 2, 4, 4, 6, 6)


def gradient_norms(settings: list[tuple[int, int]]) -> Tensor:
    """Of the residual form at the reference, for some (steps, substeps)."""
    norms = []
    for steps, substeps in settings:
        objective = as_released(steps=steps, substeps=substeps, guidance=1.0, weighting="uniform")
        models = toy_models()
        probe = replace(objective.probe(toy_batch(2), models), points_per_forward=8)
        measure_and_backward(models, probe, objective.score)
        norms.append(torch.cat([p.grad.flatten() for p in models.net.parameters()]).norm())
    return torch.stack(norms)


def test_the_residual_forms_gradient_is_the_steps_own_error() -> None:
    """At the reference it falls like 1/N, the order of the inversion: docs/inversion.md draws the conclusion."""
    slopes = gradient_norms([(20, 1), (40, 1), (80, 1)]).log().diff() / math.log(2)
    assert slopes.tolist() == pytest.approx([-1.0, -1.0], abs=0.1)


def test_with_substeps_it_is_a_property_of_the_path() -> None:
    """Finer paths between the same points leave it where it is, while more points of one step would make it vanish."""
    one, ten, twenty, forty = gradient_norms([(5, 1), (5, 10), (5, 20), (5, 40)]).tolist()
    assert ten == pytest.approx(forty, rel=0.01)
    assert twenty == pytest.approx(forty, rel=0.01)
    assert one != pytest.approx(forty, rel=0.1)


def recorded(objective: InversionDPO, batch: PairBatch, models: ToyModels) -> PairBatch:
    """The batch with the transitions that its visit looks at, out of whole trajectories."""
    whole, levels, points = (
        objective.record(batch, models),
        objective.levels(models.schedule),
        objective.visited(batch.keys),
    )
    at = points[None, :, :, None, None, None].expand(2, -1, -1, *batch.latents.shape[2:])
    moves = Transitions(whole.gather(2, at + 1), whole.gather(2, at), levels[points + 1], levels[points])
    return replace(batch, transitions=moves)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", [n for n in OBJECTIVES if getattr(OBJECTIVES[n], "recording", None)])
def test_recorded_transitions_give_the_same_probe_without_inverting(name: str, prediction_type: str) -> None:
    objective, batch = OBJECTIVES[name], toy_batch(3)
    models = toy_models(apart=0.02, prediction_type=prediction_type)
    kept = recorded(objective, batch, models)
    models.reference_calls = 0
    live, probe = objective.probe(batch, models), objective.probe(kept, models)
    calls = models.reference_calls
    torch.testing.assert_close(probe.xt, live.xt)
    torch.testing.assert_close(probe.target, live.target, rtol=1e-7, atol=1e-9)
    assert torch.equal(probe.t, live.t)
    assert objective.record(batch, models).shape == (2, 3, objective.steps + 1, 4, 6, 6)
    again = ToyModels(models.net, models.frozen, models.schedule)
    objective.probe(kept, again)
    asked = 0 if objective.form == "residual" else objective.visited(batch.keys).shape[1]
    assert again.reference_calls == asked < calls  # released forms ask at each point, one forward a point


def test_recorded_released_forms_start_at_exactly_log_2() -> None:
    """Their target is asked for as the policy is, so that not even rounding tells the two apart."""
    objective, models = as_released(steps=6, form="released"), toy_models(torch.float32)
    probe = objective.probe(recorded(objective, toy_batch(3, torch.float32), models), models)
    _, score = measure_and_backward(models, probe, objective.score)
    assert score.loss.tolist() == [float(torch.tensor(2.0).log())] * 3


def test_only_the_references_trajectories_can_be_kept() -> None:
    assert as_released(trajectory="policy").recording is None
    settings = as_released(steps=10, substeps=8, guidance=1.0).recording
    assert settings == {"steps": 10, "substeps": 8, "guidance": 1.0, "grid": "exact"}
