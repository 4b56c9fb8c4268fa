"""What a diffusers scheduler config says of the noise that a model was trained on: its betas, or why there are none.

A key that a config leaves out means the default of the class that it names; classes differ. A config that names no
class has no defaults, so its betas must be there. Classes and keys of other noise (EDM, flow matching) are refused:
such a model has no table of ᾱ_t at integer timesteps, and another one's would train it on noise it never saw.
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
# class -> its defaults, as its constructor has them; ᾱ before t = 0 is 1 where a class has no set_alpha_to_one
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
# what configs of other noise have, whatever class they name
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
    "only models trained on a discrete table of betas are tuned here (SD 1.x, 2.x, SDXL and their descendants); take "
    "such a base"
)


def check_class(name: str) -> None:
    """Raises DiffalignError for a scheduler class whose noise is no table of ᾱ_t at integer timesteps."""
    if name not in DEFAULTS:
        kind = (
            "continuous EDM noise, as Playground v2.5 and CosXL have"
            if "EDM" in name
            else "flow matching"
            if "Flow" in name
            else "noise that is not known here"
        )
        raise DiffalignError(
            f"the scheduler class {name!r} stands for {kind}: {_REMEDY}. Classes that can be read: "
            f"{', '.join(DEFAULTS)}"
        )


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say what noise a model was trained on, with the defaults of the class that the config names.

    Raises DiffalignError for a class or a key of other noise, and for betas that are missing where no class is named.
    """
    name = config.get("_class_name")
    if name is not None:
        check_class(str(name))
    given = {key: value for key, value in config.items() if value is not None}
    for key, value in given.items():
        kind = "EDM" if key.startswith("edm_") else _OTHER_NOISE.get(key)
        if kind and value is not False:
            raise DiffalignError(f"the scheduler config has {key} = {value!r}, which is {kind}: {_REMEDY}")
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
            f"the scheduler config names no class (_class_name) and lacks {', '.join(missing)}: defaults differ from "
            "class to class (beta_end is 0.02 for DDIMScheduler, 0.012 for LCMScheduler). Give the keys that the model "
            "was trained with, or its _class_name"
        )
    return given


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """ᾱ_t of a completed config, float64 [T]."""
    table = torch.cumprod(1 - _betas(config), dim=0)
    return zero_terminal_snr(table) if config.get("rescale_betas_zero_snr") else table


def zero_terminal_snr(table: Tensor) -> Tensor:
    """√ᾱ shifted and scaled so that its last entry is 0 and its first is kept (arXiv 2305.08891, Algorithm 1)."""
    root = table.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _betas(config: Mapping[str, Any]) -> Tensor:
    if config.get("trained_betas") is not None:
        try:
            return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise DiffalignError(f"trained_betas of the scheduler config: {error}; give a list of numbers") from error
    T = config.get("num_train_timesteps", _NUM_TRAIN_TIMESTEPS)
    if isinstance(T, bool) or not isinstance(T, int) or not 2 <= T <= 1_000_000:
        raise DiffalignError(f"num_train_timesteps = {T!r} of the scheduler config: must be an integer from 2 on")
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
        raise DiffalignError(f"{key} = {value!r} of the scheduler config: must be a number between 0 and 1")
    return float(value)


def one_of(field: str, value: Any, allowed: tuple[str, ...]) -> str:
    """The value. Raises DiffalignError unless it is one of the allowed."""
    if value not in allowed:
        raise DiffalignError(f"{field} = {value!r} is not supported; allowed: {', '.join(allowed)}")
    return str(value)
