"""DDIM against diffusers' schedulers, closed forms and its own convergence order."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor

from diffalign import NoiseSchedule
from diffalign.engine import ddim
from tests.toy import SDXL_CONFIG


def test_golden_steps(golden: dict) -> None:
    s = NoiseSchedule.from_diffusers(diffusers.DDIMScheduler.from_config(SDXL_CONFIG))
    for case in golden["ddim_step"]["cases"]:
        x, eps, noise = (torch.tensor(case[k], dtype=torch.float64) for k in ("x", "eps", "noise"))
        t = torch.full((len(x),), case["t"])
        step = ddim.step(s, eps, x, t, t - 50, eta=case["eta"], noise=noise)
        torch.testing.assert_close(step.prev, torch.tensor(case["prev"], dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_step_is_diffusers_step(eta: float, set_alpha_to_one: bool) -> None:
    scheduler = diffusers.DDIMScheduler.from_config(
        {**SDXL_CONFIG, "set_alpha_to_one": set_alpha_to_one, "clip_sample": False}
    )
    scheduler.set_timesteps(20)
    s = NoiseSchedule.from_diffusers(scheduler)
    for t in scheduler.timesteps.tolist():
        x, eps, noise = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)
        theirs = scheduler.step(eps, t, x, eta=eta, variance_noise=noise if eta else None)
        ours = ddim.step(s, eps, x, torch.full((2,), t), torch.full((2,), t - 50), eta, noise if eta else None)
        torch.testing.assert_close(ours.prev, theirs.prev_sample, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.x0, theirs.pred_original_sample, rtol=1e-6, atol=1e-6)


def test_upward_step_is_diffusers_inverse_step() -> None:
    config = {k: v for k, v in SDXL_CONFIG.items() if k != "set_alpha_to_one"} | {"clip_sample": False}
    inverse = diffusers.DDIMInverseScheduler.from_config(config)
    inverse.set_timesteps(20)
    s = NoiseSchedule.from_diffusers(inverse)
    for t in inverse.timesteps.tolist()[1:]:
        x, eps = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
        # diffusers labels the inverse step by where it arrives: it moves x from t − 50 to t
        theirs = inverse.step(eps, t, x).prev_sample
        ours = ddim.step(s, eps, x, torch.full((3,), t - 50), torch.full((3,), t)).prev
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_deterministic_step_is_undone_by_its_inverse() -> None:
    s = NoiseSchedule.from_config(SDXL_CONFIG)
    x, eps = torch.randn(2, 4, 4, 2, 2, dtype=torch.float64)
    low, high = torch.tensor([0, 10, 400, 900]), torch.tensor([99, 300, 401, 999])
    up = ddim.step(s, eps, x, low, high).prev
    torch.testing.assert_close(ddim.step(s, eps, up, high, low).prev, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(ddim.transition_noise(s, up, x, high, low), eps, rtol=0, atol=1e-9)


def test_per_sample_timesteps_are_the_singletons() -> None:
    s = NoiseSchedule.from_config(SDXL_CONFIG)
    x, eps, noise = torch.randn(3, 3, 4, 2, 2, dtype=torch.float64)
    t, prev = torch.tensor([999, 500, 51]), torch.tensor([949, 100, -1])
    batch = ddim.step(s, eps, x, t, prev, 0.7, noise)
    for i in range(3):
        one = slice(i, i + 1)
        alone = ddim.step(s, eps[one], x[one], t[one], prev[one], 0.7, noise[one])
        assert torch.equal(batch.prev[one], alone.prev)
        assert torch.equal(batch.std[one], alone.std)


def test_log_density_is_torch_distributions() -> None:
    sample, mean = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    std = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std[:, None, None, None]).log_prob(sample).mean((1, 2, 3))
    torch.testing.assert_close(ddim.log_density(sample, mean, std), expected)


def gaussian_eps(s: NoiseSchedule, data_std: float) -> ddim.EpsFn:
    """The exact noise prediction when data are N(0, data_std²)."""

    def eps(x: Tensor, t: Tensor) -> Tensor:
        a, sig = s.coefficients(t, x)
        return sig * x / (a**2 * data_std**2 + sig**2)

    return eps


def flow_to(s: NoiseSchedule, x0: Tensor, t: Tensor, data_std: float) -> Tensor:
    """Where the probability-flow ODE of that Gaussian takes a clean x0: the closed form of exact inversion."""
    a, sig = s.coefficients(t, x0)
    return x0 * (a**2 * data_std**2 + sig**2).sqrt() / data_std


def test_inversion_converges_with_order_one_to_the_closed_form() -> None:
    s = NoiseSchedule.from_config({**SDXL_CONFIG, "num_train_timesteps": 20000, "beta_start": 4e-5, "beta_end": 6e-4})
    x0, t = torch.randn(3, 4, 2, 2, dtype=torch.float64), torch.tensor([19999, 12345, 8000])
    strides = torch.tensor([800, 400, 200, 100, 50])
    exact = flow_to(s, x0, t, 0.7)
    errors = torch.stack([(ddim.invert(s, gaussian_eps(s, 0.7), x0, t, int(h)) - exact).abs().max() for h in strides])
    slopes = errors.log().diff() / strides.double().log().diff()
    assert slopes[-1] == pytest.approx(1.0, abs=0.15)
    assert errors[-1] < 0.02


def test_inversion_ends_exactly_at_t_for_every_sample_by_itself() -> None:
    s = NoiseSchedule.from_config(SDXL_CONFIG)
    asked: list[list[int]] = []

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t.tolist())
        return gaussian_eps(s, 1.0)(x, t)

    t = torch.tensor([0, 2, 99, 100, 437, 905, 999])
    x0 = torch.randn(7, 4, 8, 8, dtype=torch.float64)
    batch = ddim.invert(s, eps_fn, x0, t)
    assert asked[-1] == t.tolist()
    assert len(asked) == 10
    for i in range(7):
        alone = ddim.invert(s, gaussian_eps(s, 1.0), x0[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=1e-14)


def test_sampling_the_gaussian_recovers_its_variance() -> None:
    s = NoiseSchedule.from_config({**SDXL_CONFIG, "set_alpha_to_one": True})
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(1, 4, 100, 100, dtype=torch.float64, generator=generator)
    x0 = ddim.sample(s, gaussian_eps(s, 0.7), xt, steps=500)
    assert float(x0.std()) == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, x, t: ddim.step(s, x, x, t, t + 1, eta=1.0), "t_prev < t"),
        (lambda s, x, t: ddim.step(s, x, x, t, t - 1, eta=-1.0), "negative"),
        (lambda s, x, t: ddim.log_density(x, x, torch.zeros(2)), "std > 0"),
        (lambda s, x, t: ddim.sample(s, lambda a, b: a, x, 4, eta=1.0), "needs noise"),
        (lambda s, x, t: ddim.invert(s, lambda a, b: a, x, t - 100), "t >= 0"),
    ],
)
def test_faults_are_named(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(NoiseSchedule.from_config(SDXL_CONFIG), torch.randn(2, 4, 2, 2), torch.tensor([50, 60]))
