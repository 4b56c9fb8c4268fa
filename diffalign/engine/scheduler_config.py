"""The betas of a diffusers scheduler config: the noise that a model was trained with, or the reason for a refusal.

A key that the config leaves out has the default of the class that it names; these defaults differ between classes. A
config without a class has no defaults, so it must give its betas. Classes and keys of EDM and flow matching are
refused: such models have no table of ᾱ_t at integer timesteps, and with another model's table they would train on
other noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import DiffalignError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")
_NUM_TRAIN_TIMESTEPS = 1000  # of every class below

_DDPM = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "leading"}
_SOLVER = _DDPM | {"timestep_spacing": "linspace"}
_SD = _SOLVER | {"beta_start": 0.00085, "beta_end": 0.012}
_LCM = _SD | {"beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
# class -> the defaults of its constructor; the final ᾱ is 1 where a class has no set_alpha_to_one
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMInverseScheduler": _DDPM,
    "DDIMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDPMScheduler": _DDPM,
    "DEISMultistepScheduler": _SOLVER,
    "DPMSolverMultistepInverseScheduler": _SOLVER,
    "DPMSolverMultistepScheduler": _SOLVER,
    "DPMSolverSDEScheduler": _SD,
    "DPMSolverSinglestepScheduler": _SOLVER,
    "EulerAncestralDiscreteScheduler": _SOLVER,
    "EulerDiscreteScheduler": _SOLVER,
    "HeunDiscreteScheduler": _SD,
    "KDPM2AncestralDiscreteScheduler": _SD,
    "KDPM2DiscreteScheduler": _SD,
    "LCMScheduler": _LCM,
    "LMSDiscreteScheduler": _SOLVER,
    "PNDMScheduler": _DDPM | {"set_alpha_to_one": False},
    "SASolverScheduler": _SOLVER,
    "TCDScheduler": _LCM,
    "UniPCMultistepScheduler": _SOLVER,
}
# keys of other kinds of noise, with any class
_OTHER_NOISE = {
    "sigma_data": "EDM",
    "sigma_schedule": "EDM",
    "sigma_min": "EDM",
    "sigma_max": "EDM",
    "shift": "flow matching",
    "base_shift": "flow matching",
    "use_dynamic_shifting": "flow matching",
    "use_flow_sigmas": "flow matching",
    "snr_shift_scale": "a shifted signal-to-noise ratio",
}
_REMEDY = (
    "diffalign tunes models trained on a discrete table of betas (SD 1.x, 2.x, SDXL and their descendants); use such a "
    "base"
)


def check_class(name: str) -> None:
    """Raises DiffalignError for a scheduler class without a table of ᾱ_t at integer timesteps."""
    if name not in DEFAULTS:
        kind = (
            "continuous EDM noise, as Playground v2.5 and CosXL have"
            if "EDM" in name
            else "flow matching"
            if "Flow" in name
            else "an unknown kind of noise"
        )
        raise DiffalignError(
            f"the scheduler class {name!r} means {kind}: {_REMEDY}. Known classes: {', '.join(DEFAULTS)}"
        )


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the defaults of the class that it names.

    Raises DiffalignError for a class or a key of other noise, and for missing betas in a config without a class.
    """
    name = config.get("_class_name")
    if name is not None:
        check_class(str(name))
    given = {key: value for key, value in config.items() if value is not None}
    for key, value in given.items():
        kind = "EDM" if key.startswith("edm_") else _OTHER_NOISE.get(key)
        if kind and value is not False:
            raise DiffalignError(f"the scheduler config has {key} = {value!r}, which means {kind}: {_REMEDY}")
    if given.get("timestep_type", "discrete") != "discrete":
        raise DiffalignError(f"the scheduler config has timestep_type = {given['timestep_type']!r}: {_REMEDY}")
    one_of("prediction_type", given.get("prediction_type", "epsilon"), PREDICTION_TYPES)
    one_of("beta_schedule", given.get("beta_schedule", "linear"), BETA_SCHEDULES)
    if name is not None:
        return DEFAULTS[str(name)] | given
    if "trained_betas" in given or given.get("beta_schedule") == "squaredcos_cap_v2":
        return given
    missing = [key for key in ("beta_start", "beta_end", "beta_schedule") if key not in given]
    if missing:
        raise DiffalignError(
            f"the scheduler config names no class (_class_name) and lacks {', '.join(missing)}. Defaults differ "
            "between classes (beta_end is 0.02 for DDIMScheduler, 0.012 for LCMScheduler): add the keys that the model "
            "was trained with, or its _class_name"
        )
    return given


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """ᾱ_t of a config with its defaults (`completed`): float64 [T]."""
    table = torch.cumprod(1 - _betas(config), dim=0)
    return zero_terminal_snr(table) if config.get("rescale_betas_zero_snr") else table


def zero_terminal_snr(table: Tensor) -> Tensor:
    """The table with √ᾱ shifted and scaled: its last entry becomes 0, its first stays (arXiv 2305.08891, Alg. 1)."""
    root = table.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _betas(config: Mapping[str, Any]) -> Tensor:
    if config.get("trained_betas") is not None:
        try:
            return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise DiffalignError(f"trained_betas in the scheduler config: {error}; give a list of numbers") from error
    T = config.get("num_train_timesteps", _NUM_TRAIN_TIMESTEPS)
    if isinstance(T, bool) or not isinstance(T, int) or not 2 <= T <= 1_000_000:
        raise DiffalignError(f"num_train_timesteps = {T!r} in the scheduler config must be an integer of at least 2")
    kind = config["beta_schedule"]
    if kind == "squaredcos_cap_v2":
        # Nichol & Dhariwal (arXiv 2102.09672): ᾱ(u) = cos²(π/2 (u + .008) / 1.008), each β capped at .999
        u = torch.arange(T + 1, dtype=torch.float64) / T
        cosine = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - cosine[1:] / cosine[:-1]).clamp(max=0.999)
    start, end = _beta(config, "beta_start"), _beta(config, "beta_end")
    if kind == "linear":
        return torch.linspace(start, end, T, dtype=torch.float64)
    return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2


def _beta(config: Mapping[str, Any], key: str) -> float:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise DiffalignError(f"{key} = {value!r} in the scheduler config must be a number between 0 and 1")
    return float(value)


def one_of(field: str, value: Any, allowed: tuple[str, ...]) -> str:
    """The value, if it is one of `allowed`; else raises DiffalignError that names the field."""
    if value not in allowed:
        raise DiffalignError(f"{field} = {value!r} is not supported; allowed: {', '.join(allowed)}")
    return str(value)
