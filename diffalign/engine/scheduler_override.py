"""Settings in place of a scheduler config's own: which ones there are, and what they change about the noise.

They are the keys of diffusers' schedulers that say which noise a model was trained on, what it predicts, and where a
sampler's steps are. Left out are the keys of single samplers (solver order, thresholding, final sigmas), the number of
timesteps, and tables of betas, which belong in a model's own config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError

BETAS = ("beta_start", "beta_end", "beta_schedule")
OVERRIDES = (
    "prediction_type",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    *BETAS,
)


def overridden(config: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler config with the keys of `override` in place of its own.

    Raises DiffalignError for a key that is not one of OVERRIDES, for betas where the config has a table of them, and
    for zero terminal SNR with a model that predicts the noise: at the last timestep its input is that noise, so its
    prediction says nothing about the image.
    """
    if unknown := [key for key in override if key not in OVERRIDES]:
        raise DiffalignError(f"scheduler: {unknown[0]} cannot be set; allowed: {', '.join(OVERRIDES)}")
    if config.get("trained_betas") is not None and (idle := [key for key in override if key in BETAS]):
        raise DiffalignError(f"scheduler: {idle[0]} has no effect, because the config has trained_betas; remove it")
    made = {**config, **override}
    if made.get("rescale_betas_zero_snr") and made.get("prediction_type", "epsilon") == "epsilon":
        raise DiffalignError(
            "scheduler: rescale_betas_zero_snr needs a model that predicts v or the sample, and this one predicts "
            "epsilon: set prediction_type too if it was trained otherwise, or rescale in training alone with "
            "model.rescale_betas_zero_snr"
        )
    return made


def changes(before: NoiseSchedule, after: NoiseSchedule) -> str:
    """What differs between two schedules, in one line; empty where nothing does."""
    names = ("prediction_type", "timestep_spacing", "steps_offset", "final_alpha_cumprod")
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in names}
    pairs["SNR at the last timestep"] = (_last_snr(before), _last_snr(after))
    pairs["first of 30 sampling steps"] = (_first(before), _first(after))
    found = [f"{name} {_text(was)} -> {_text(now)}" for name, (was, now) in pairs.items() if was != now]
    if not found and not bool((before.alphas_cumprod == after.alphas_cumprod).all()):
        found = ["the table of betas between its ends"]
    return ", ".join(found)


def _last_snr(schedule: NoiseSchedule) -> float:
    last = float(schedule.alphas_cumprod[-1])
    return last / (1 - last)


def _first(schedule: NoiseSchedule) -> int:
    return int(schedule.timesteps(min(30, schedule.num_train_timesteps))[0])


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
