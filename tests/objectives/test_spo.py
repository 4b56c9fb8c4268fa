"""SPO: by hand, its two forms, the clip, and one call of the policy for both sides."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffalign import NoiseSchedule
from diffalign.engine import ddim
from diffalign.engine.measure import guided, measure
from diffalign.objectives import SPO
from diffalign.types import Conditioning, Evidence, PairBatch, Transitions
from tests.toy import SDXL_CONFIG, toy_batch, toy_models

PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def seen(policy: tuple[float, float], weight: float = 1.0) -> Evidence:
    return Evidence(column(*policy), column(0.5, 0.5), weight=torch.tensor([weight], dtype=torch.float64))


def test_by_hand() -> None:
    score = SPO().score(seen((0.45, 0.5)))
    assert float(score.logit) == pytest.approx(0.5)
    assert float(score.loss) == pytest.approx(math.log(1 + math.exp(-0.5)))
    assert float(score.metrics["clip_rate"]) == 0.0
    doubled = SPO().score(seen((0.475, 0.5), weight=2.0))
    assert float(doubled.loss) == pytest.approx(float(score.loss))
    clipped = SPO().score(seen((0.3, 0.5)))
    assert float(clipped.logit) == pytest.approx(10 * math.log(1.1))
    assert float(clipped.metrics["clip_rate"]) == 0.5


def test_a_clipped_side_has_no_slope_and_a_wild_one_no_nan() -> None:
    policy = torch.tensor([[0.3, 1e6], [0.5, -1e6]], dtype=torch.float64, requires_grad=True)
    evidence = Evidence(policy, torch.full((2, 2), 0.5, dtype=torch.float64), weight=torch.ones(2))
    SPO().score(evidence).loss.sum().backward()
    assert policy.grad[0, 0] == 0
    assert policy.grad[1, 0] != 0
    assert policy.grad[:, 1].tolist() == [0, 0]


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_weighted_errors_are_the_ratio_of_densities(prediction_type: str, eta: float) -> None:
    models = toy_models(apart=0.02, prediction_type=prediction_type)
    batch, s, objective = toy_batch(8), models.schedule, SPO(eta=eta)
    probe = objective.probe(batch, models)
    evidence = measure(models, probe)
    moves = batch.transitions
    t, t_prev = (x.expand(2, -1).flatten() for x in (moves.t, moves.t_prev))
    x, after = moves.noisy.flatten(0, 1), moves.clean.flatten(0, 1)
    log_p = []
    for network in (models.net, models.frozen):
        answer = guided(network, x, t, batch.cond.flatten(), 5.0, batch.uncond.flatten())
        step = ddim.step(s, s.to_eps(answer, x, t), x, t, t_prev, eta, x0=s.to_x0(answer, x, t))
        log_p.append(ddim.log_density(after, step.mean, step.std))
    expected = (log_p[0] - log_p[1]).view(2, -1)
    log_ratio = -probe.weight * evidence.margin
    assert float(expected.detach().abs().max()) > 1e-2  # a difference worth comparing
    torch.testing.assert_close(log_ratio, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_target_leads_to_where_the_sampler_went(prediction_type: str, eta: float) -> None:
    models, batch = toy_models(prediction_type=prediction_type), toy_batch(8)
    probe, s, moves = SPO(eta=eta).probe(batch, models), models.schedule, batch.transitions
    t, t_prev = (x.expand(2, -1) for x in (moves.t, moves.t_prev))
    eps, x0 = s.to_eps(probe.target, probe.xt, t), s.to_x0(probe.target, probe.xt, t)
    mean = ddim.step(s, eps, probe.xt, t, t_prev, eta, x0=x0).mean
    torch.testing.assert_close(mean, moves.clean, rtol=0, atol=1e-11)


def test_the_weight_is_the_growth_of_the_signal_to_noise_ratio() -> None:
    models, batch = toy_models(), toy_batch(19)
    moves = replace(batch.transitions, t=torch.arange(51, 1000, 50), t_prev=torch.arange(1, 950, 50))
    weight = SPO().probe(replace(batch, transitions=moves), models).weight
    snr = models.schedule.snr
    torch.testing.assert_close(weight, (snr(moves.t_prev) / snr(moves.t) - 1) / 2, rtol=1e-12, atol=0)
    assert float(weight[0]) == pytest.approx(14.747, abs=1e-3)  # t = 51: it clips first
    assert 0.19 < float(weight[1:].min()) < float(weight[1:].max()) < 0.66


def zero_terminal(prediction_type: str) -> NoiseSchedule:
    config = {"rescale_betas_zero_snr": True, "prediction_type": prediction_type, "timestep_spacing": "trailing"}
    return NoiseSchedule.from_config({**SDXL_CONFIG, **config})


def test_zero_terminal_snr() -> None:
    batch = toy_batch(2)
    moves = replace(batch.transitions, t=torch.tensor([999, 949]), t_prev=torch.tensor([949, 899]))
    batch = replace(batch, transitions=moves)
    for prediction_type in ("v_prediction", "sample"):
        models = replace(toy_models(), schedule=zero_terminal(prediction_type))
        probe = SPO().probe(batch, models)
        assert bool(probe.target.isfinite().all())
        assert bool((probe.weight > 0).all())
    with pytest.raises(ValueError, match="zero terminal SNR"):
        SPO().probe(batch, replace(toy_models(), schedule=zero_terminal("epsilon")))


def test_sides_that_share_x_t_are_asked_once() -> None:
    models, batch, rows = toy_models(), toy_batch(3), []

    def counted(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        rows.append(len(x))
        return models.net(x, t, cond)

    models.policy = counted  # type: ignore[method-assign]
    probe = SPO().probe(batch.to("cpu"), models)
    measure(models, probe)
    apart = replace(batch.transitions, noisy=batch.transitions.noisy.clone())
    measure(models, SPO().probe(replace(batch, transitions=apart), models))
    assert rows == [3 + 3, 6 + 6]  # with guidance; shared, then not


def no_transitions(batch: PairBatch) -> PairBatch:
    return replace(batch, transitions=None)


def several(batch: PairBatch) -> PairBatch:
    m = batch.transitions
    return replace(batch, transitions=Transitions(m.noisy[:, :, None], m.clean[:, :, None], m.t[:, None], m.t[:, None]))


def without_noise(batch: PairBatch) -> PairBatch:
    return replace(batch, transitions=replace(batch.transitions, t_prev=batch.transitions.t))


@pytest.mark.parametrize(
    ("change", "words"),
    [(no_transitions, "are finished images"), (several, "have 1 steps each"), (without_noise, "no density")],
)
def test_faulty_pairs_are_refused(change: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SPO().probe(change(toy_batch(2)), toy_models())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"beta": 0.0}, "beta"), ({"clip": 1.0}, "clip = 1.0"), ({"eta": 0.0}, "eta = 0.0"), ({"eta": 1.5}, "eta")],
)
def test_faulty_settings_are_named(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SPO(**settings)
    with pytest.raises(ValueError, match="weight"):
        SPO().score(Evidence(column(0.5, 0.5), column(0.5, 0.5)))
