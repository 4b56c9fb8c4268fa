"""Zero terminal SNR: at t = T − 1, where ᾱ = 0, the engine gives the limits of its values for ᾱ → 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffalign import NoiseSchedule
from diffalign.engine import ddim
from diffalign.engine.inversion import FixedPoint, ReNoise, arrive, strided_ascent, transition_target
from diffalign.engine.measure import measure
from diffalign.objectives import inpo, smpo
from diffalign.objectives.base import Objective
from tests.toy import SDXL_CONFIG, toy_batch, toy_models

ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def ending_at(last: float, prediction_type: str) -> NoiseSchedule:
    """A table rescaled to zero terminal SNR, but for its last entry."""
    table = NoiseSchedule.from_config({**SDXL_CONFIG, **ZERO}).alphas_cumprod.clone()
    assert float(table[-1]) == 0
    table[-1] = last
    return NoiseSchedule(table, prediction_type=prediction_type)


def facts(s: NoiseSchedule, t: int, stride: int) -> dict[str, Tensor]:
    """All that the engine says about steps to and from t."""
    torch.manual_seed(0)
    at = torch.tensor([t, t])
    prev, ascent = (at - stride).clamp(min=-1), strided_ascent(at, max(stride, 100))
    x0, noise, answer = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)
    xt = s.add_noise(x0, noise, at)
    step = ddim.step(s, s.to_eps(answer, xt, at), xt, at, prev, 0.7, noise, x0=s.to_x0(answer, xt, at))
    below, above = s.alpha_bar(prev), s.alpha_bar(at)
    p, q = ddim.mean_of_prediction(s, at, prev, 0.7)

    def ask(x: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        return 0.3 * x

    return {
        "inversion_std": ddim.inversion_std(s, ascent, 0.3),
        "variance": ddim.variance(s, at, prev),
        "no step": ddim.variance(s, at, at),
        "snr": s.snr(at),
        "p": p,
        "q": q,
        "mean": step.mean,
        "prev": step.prev,
        "std": step.std,
        "density": ddim.log_density(step.prev, step.mean, step.std.clamp(min=0.1)),
        "between": ddim.transition_noise(s, xt, step.prev, at, prev),
        "target": transition_target(s, step.prev, xt, below, above, at),
        "implied": s.implied_noise(x0, xt, at),
        "inverted": arrive(s, ask, x0, ascent),
        "renoised": arrive(s, ask, x0, ascent, ReNoise(2)),
        "solved": arrive(s, ask, x0, ascent, FixedPoint(1e-12, 100)),
    }


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize(("t", "stride"), [(999, 100), (999, 7), (999, 1), (998, 100), (899, 100), (5, 100)])
def test_the_value_is_the_limit(t: int, stride: int, prediction_type: str) -> None:
    zero, near = (facts(ending_at(last, prediction_type), t, stride) for last in (0.0, 1e-26))
    for name, value in zero.items():
        assert bool(torch.isfinite(value).all()), name
        torch.testing.assert_close(value, near[name], rtol=1e-9, atol=1e-9)
    assert zero["no step"].tolist() == [0.0, 0.0]


def test_the_noise_added_on_the_way_to_pure_noise() -> None:
    """The last step has no level above it: nothing is added. The one before gets η²(1 − ᾱ), as from ᾱ = 0."""
    s = ending_at(0.0, "v_prediction")
    ascent = strided_ascent(torch.tensor([999]), 100)
    std = ddim.inversion_std(s, ascent, 0.1)[0]
    assert float(std[-1]) == 0
    assert float(std[-2]) == pytest.approx(0.1 * (1 - float(s.alphas_cumprod[899])) ** 0.5, rel=1e-12)
    assert bool((std[:-1] > 0).all())


def test_a_final_alpha_of_one_is_no_step_from_itself() -> None:
    s = ending_at(0.0, "v_prediction")
    assert ddim.variance(s, torch.tensor([-1]), torch.tensor([-1])).tolist() == [0.0]


@pytest.mark.parametrize("objective", [inpo.InPO(), inpo.InPO(grid="released"), smpo.SmPO(), smpo.SmPO(tolerance=1e-4)])
def test_inverted_pairs_train_at_pure_noise(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    last = lambda keys, stream, low, high: torch.full((len(keys),), 999)  # noqa: E731
    monkeypatch.setattr(inpo, "integers", last)
    monkeypatch.setattr(smpo, "integers", last)
    models = toy_models(torch.float32, apart=0.02, **ZERO)
    seen = measure(models, objective.probe(toy_batch(3, torch.float32), models))
    loss = objective.score(seen).loss
    loss.mean().backward()
    assert bool(torch.isfinite(loss).all())
    slope = sum(float(p.grad.abs().sum()) for p in models.net.parameters())
    assert 0 < slope < float("inf")
