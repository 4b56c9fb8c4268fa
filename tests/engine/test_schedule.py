"""The schedule against diffusers' schedulers, and its conversions against each other."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch

from diffalign import NoiseSchedule
from diffalign.engine.scheduler_config import DEFAULTS
from diffalign.errors import DiffalignError
from tests.toy import SDXL_CONFIG

CONFIGS = {
    "sdxl": SDXL_CONFIG,
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero-snr": {**SDXL_CONFIG, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "short": {"num_train_timesteps": 50, "beta_schedule": "scaled_linear", "beta_start": 1e-3, "beta_end": 0.1},
    "trained": {"num_train_timesteps": 4, "trained_betas": [0.1, 0.2, 0.3, 0.4]},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_table_is_diffusers_table_in_float64(config: dict) -> None:
    scheduler = diffusers.DDIMScheduler.from_config(config)
    ours = NoiseSchedule.from_config(config)
    assert ours.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(ours.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=3e-5, atol=2e-6)
    theirs = NoiseSchedule.from_diffusers(scheduler)
    assert torch.equal(theirs.alphas_cumprod.float(), scheduler.alphas_cumprod)
    assert theirs.final_alpha_cumprod == pytest.approx(float(scheduler.final_alpha_cumprod))
    assert ours.final_alpha_cumprod == pytest.approx(float(scheduler.final_alpha_cumprod), rel=1e-6)


def test_zero_terminal_snr_is_exactly_zero() -> None:
    schedule = NoiseSchedule.from_config(CONFIGS["zero-snr"])
    assert float(schedule.alphas_cumprod[-1]) == 0.0
    assert float(schedule.snr(torch.tensor(999))) == 0.0
    scheduler = diffusers.EulerDiscreteScheduler.from_config(CONFIGS["zero-snr"])
    assert torch.equal(NoiseSchedule.from_diffusers(scheduler).alphas_cumprod, scheduler.alphas_cumprod.double())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 10, 20, 50, 999])
def test_grids_are_diffusers_grids(spacing: str, steps: int) -> None:
    config = {**SDXL_CONFIG, "timestep_spacing": spacing}
    scheduler = diffusers.DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    grid = NoiseSchedule.from_config(config).timesteps(steps)
    assert grid.dtype == torch.int64
    assert grid.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_conversions_round_trip_in_float64(prediction_type: str) -> None:
    s = NoiseSchedule.from_config({**SDXL_CONFIG, "prediction_type": prediction_type})
    t = torch.tensor([0, 1, 499, 998, 999])
    x0, noise = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
    xt = s.add_noise(x0, noise, t)
    torch.testing.assert_close(s.implied_noise(x0, xt, t), noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(s.predict_x0(noise, xt, t), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(s.eps_from_v(s.v_from_eps(noise, xt, t), xt, t), noise, rtol=0, atol=1e-12)
    prediction = s.target(x0, noise, t)
    torch.testing.assert_close(s.to_eps(prediction, xt, t), noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(s.to_x0(prediction, xt, t), x0, rtol=0, atol=1e-12)


def test_targets_and_noising_are_diffusers() -> None:
    scheduler = diffusers.DDPMScheduler.from_config({**SDXL_CONFIG, "prediction_type": "v_prediction"})
    s = NoiseSchedule.from_diffusers(scheduler)
    t = torch.tensor([3, 500, 999])
    x0, noise = torch.randn(2, 3, 4, 2, 2)
    torch.testing.assert_close(s.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t))
    torch.testing.assert_close(s.target(x0, noise, t), scheduler.get_velocity(x0, noise, t))


def test_half_precision_latents_are_noised_in_float32_with_a_float64_table() -> None:
    s = NoiseSchedule.from_config(SDXL_CONFIG)
    x0, noise, t = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), torch.tensor([1, 900])
    noised = s.add_noise(x0.bfloat16(), noise.bfloat16(), t)
    assert noised.dtype == torch.float32
    torch.testing.assert_close(noised, s.add_noise(x0.bfloat16().float(), noise.bfloat16().float(), t))


def test_side_axis_and_scalar_t() -> None:
    s = NoiseSchedule.from_config(SDXL_CONFIG)
    x0, noise = torch.randn(2, 2, 3, 4, 2, 2, dtype=torch.float64)
    t = torch.tensor([5, 100, 999])
    both = s.add_noise(x0, noise, t.expand(2, 3))
    torch.testing.assert_close(both[1], s.add_noise(x0[1], noise[1], t))
    torch.testing.assert_close(s.add_noise(x0, noise, torch.tensor(7)), s.add_noise(x0, noise, torch.full((2, 3), 7)))


def test_snr() -> None:
    s = NoiseSchedule.from_config(SDXL_CONFIG)
    t = torch.arange(1000)
    torch.testing.assert_close(s.snr(t), s.alphas_cumprod / (1 - s.alphas_cumprod))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s, x: s.add_noise(x, x, torch.tensor([1.0, 2.0])), TypeError, "int64"),
        (lambda s, x: s.add_noise(x, x, torch.tensor([1, 1000])), ValueError, "1000 is outside.*0 … 999"),
        (lambda s, x: s.add_noise(x, x, torch.tensor([1, 2, 3])), ValueError, "one timestep per sample"),
        (lambda s, x: s.timesteps(0), ValueError, "allows 1 to 1000 steps"),
        (lambda s, x: s.timesteps(5, "karras"), ValueError, "leading, trailing, linspace"),
        (lambda s, x: NoiseSchedule.from_config({"beta_schedule": "sigmoid"}), ValueError, "squaredcos_cap_v2"),
        (lambda s, x: NoiseSchedule.from_config({"prediction_type": "flow"}), ValueError, "v_prediction"),
        (lambda s, x: NoiseSchedule.from_config({**SDXL_CONFIG, "beta_end": 1.2}), ValueError, "beta_end = 1.2"),
        (
            lambda s, x: NoiseSchedule.from_config({**SDXL_CONFIG, "num_train_timesteps": 0}),
            ValueError,
            "num_train_timesteps = 0",
        ),
    ],
)
def test_faults_are_named(call: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(NoiseSchedule.from_config(SDXL_CONFIG), torch.randn(2, 4, 2, 2))


def test_pure_noise_has_no_x0() -> None:
    s = NoiseSchedule.from_config(CONFIGS["zero-snr"])
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        s.predict_x0(x, x, torch.tensor([5, 999]))
    x0, noise, t = torch.randn_like(x), x, torch.tensor([5, 999])
    torch.testing.assert_close(s.to_x0(s.target(x0, noise, t), s.add_noise(x0, noise, t), t), x0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", DEFAULTS)
def test_keys_that_are_missing_are_those_of_the_class(name: str) -> None:
    cls = getattr(diffusers, name)
    parameters = inspect.signature(cls.__init__).parameters
    if "beta_start" not in parameters:
        pytest.skip(f"{name} wants a package that is not installed")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "timestep_spacing", "set_alpha_to_one")
    defaults = {key: parameters[key].default for key in names if key in parameters}
    assert {"num_train_timesteps": 1000, "set_alpha_to_one": True, **DEFAULTS[name]}.items() >= defaults.items()
    ours, theirs = NoiseSchedule.from_config({"_class_name": name}), NoiseSchedule.from_diffusers(cls())
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=3e-5, atol=2e-6)
    assert ours.timestep_spacing == theirs.timestep_spacing
    assert ours.final_alpha_cumprod == pytest.approx(theirs.final_alpha_cumprod, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 1.0}, "EDMEulerScheduler.*continuous EDM noise.*SDXL"),
        ({**SDXL_CONFIG, "_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching.*SDXL"),
        ({**SDXL_CONFIG, "_class_name": "MyScheduler"}, "'MyScheduler'.*unknown kind of noise.*DDIMScheduler"),
        ({**SDXL_CONFIG, "_class_name": "DDIMScheduler", "sigma_data": 0.5}, "sigma_data = 0.5, which means EDM.*SDXL"),
        ({**SDXL_CONFIG, "edm_mean": [0.0]}, "edm_mean = .*EDM"),
        ({**SDXL_CONFIG, "use_flow_sigmas": True}, "use_flow_sigmas = True, which means flow matching"),
        ({**SDXL_CONFIG, "timestep_type": "continuous"}, "timestep_type = 'continuous'"),
        ({"num_train_timesteps": 10}, "lacks beta_start, beta_end, beta_schedule.*_class_name"),
        ({"beta_schedule": "scaled_linear", "beta_start": 1e-3}, r"lacks beta_end\. Defaults differ"),
    ],
)
def test_other_noise_is_refused(config: dict, words: str) -> None:
    with pytest.raises(DiffalignError, match=words):
        NoiseSchedule.from_config(config)


@pytest.mark.parametrize("cls", [diffusers.EDMEulerScheduler, diffusers.FlowMatchEulerDiscreteScheduler])
def test_objects_of_other_noise_are_refused(cls: type) -> None:
    with pytest.raises(DiffalignError, match=cls.__name__):
        NoiseSchedule.from_diffusers(cls())


def test_a_subclass_counts_as_the_class_it_is_derived_from() -> None:
    class Own(diffusers.DDIMScheduler):
        pass

    assert NoiseSchedule.from_diffusers(Own(**SDXL_CONFIG)).steps_offset == 1
