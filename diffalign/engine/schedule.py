"""The noise schedule: the table of ᾱ_t in float64, conversions between predictions, sampling grids and SNR.

    x_t = a_t x_0 + s_t ε,   a_t = √ᾱ_t,   s_t = √(1−ᾱ_t),   v = a_t ε − s_t x_0   (Salimans & Ho, arXiv 2202.00512)

Timesteps are int64 and have the leading axes of their latents: t "n" belongs to x "n c h w", and t "side pair" to x
"side pair c h w". A 0-dimensional t belongs to every sample. Coefficients are computed in float64 and cast once, to
the dtype of the latents or to float32 if that is wider.

Left out: continuous-time and flow schedules; the models tuned here were trained on a discrete table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.engine.scheduler_config import (
    DEFAULTS,
    PREDICTION_TYPES,
    SPACINGS,
    alphas_cumprod,
    completed,
    one_of,
)
from diffalign.errors import DiffalignError


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The ᾱ table that a model was trained with, and all that follows from it."""

    alphas_cumprod: Tensor  # float64 [T]
    final_alpha_cumprod: float = 1.0  # ᾱ of any timestep below 0, where sampling ends
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.dtype != torch.float64 or table.ndim != 1:
            raise DiffalignError(f"alphas_cumprod must be float64 [T], got {table.dtype} {tuple(table.shape)}")
        if not bool(((table >= 0) & (table < 1)).all()):
            raise DiffalignError("alphas_cumprod must lie in [0, 1): 0 is pure noise, 1 a clean image")
        one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        one_of("timestep_spacing", self.timestep_spacing, SPACINGS)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule of a diffusers scheduler config, with the table computed in float64.

        A missing key has the default of the class in `_class_name`. Without a class, the config must give the betas.
        Keys that concern neither the table nor the prediction type nor the sampling grid are ignored.

        Raises DiffalignError for a class or key of a model without such a table (EDM, flow matching, unknown classes),
        for missing betas, and for an unknown beta schedule, prediction type or spacing.
        """
        config = completed(config)
        return cls._with_grid(alphas_cumprod(config), config)

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule of a diffusers scheduler object: the object's float32 table, cast to float64.

        At zero terminal SNR, Euler-type schedulers have 2^-24 as the last entry; `from_config` gives the exact 0.
        A subclass has the defaults of the class it is derived from. Raises DiffalignError as `from_config` does.
        """
        names = [base.__name__ for base in type(scheduler).__mro__]
        name = next((name for name in names if name in DEFAULTS), names[0])
        config = completed({**scheduler.config, "_class_name": name})
        return cls._with_grid(scheduler.alphas_cumprod.detach().to("cpu", torch.float64), config)

    @classmethod
    def _with_grid(cls, alphas_cumprod: Tensor, config: Mapping[str, Any]) -> NoiseSchedule:
        to_one = config.get("set_alpha_to_one", True)
        return cls(
            alphas_cumprod=alphas_cumprod,
            final_alpha_cumprod=1.0 if to_one else float(alphas_cumprod[0]),
            prediction_type=config.get("prediction_type", "epsilon"),
            timestep_spacing=config.get("timestep_spacing", "leading"),
            steps_offset=config.get("steps_offset", 0),
        )

    @property
    def num_train_timesteps(self) -> int:
        """T: valid timesteps are 0 … T−1."""
        return len(self.alphas_cumprod)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ_t in float64, with the shape and device of t; a negative t gives the final ᾱ.

        Raises TypeError if t is no int64 tensor, and DiffalignError for t ≥ T if t is on the CPU. On another device t
        is not checked, because reading it would wait for the device.
        """
        if not isinstance(t, Tensor):
            raise TypeError(f"timesteps must be an int64 tensor, got {t!r}; use torch.tensor({t!r}) for all samples")
        if t.dtype != torch.int64:
            raise TypeError(
                f"timesteps must be int64, got {t.dtype}; convert them before they are rounded to half precision"
            )
        if t.device.type == "cpu" and t.numel() and int(t.max()) >= self.num_train_timesteps:
            raise DiffalignError(
                f"timestep {int(t.max())} is outside this schedule: allowed are 0 … {self.num_train_timesteps - 1}"
            )
        table = self.alphas_cumprod.to(t.device)
        return torch.where(t < 0, self.final_alpha_cumprod, table[t.clamp(min=0)])

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t, shaped to multiply `like`, on its device, in its dtype or float32 if that is wider."""
        alpha_bar = self.alpha_bar(t)
        return spread(alpha_bar.sqrt(), like), spread((1 - alpha_bar).sqrt(), like)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = a_t x_0 + s_t ε."""
        a, s = self.coefficients(t, x0)
        return a * x0 + s * noise

    def implied_noise(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The noise ε with `add_noise(x0, ε, t)` = x_t. In general it is not a sample of a normal distribution."""
        a, s = self.coefficients(t, x0)
        return (xt - a * x0) / s

    def predict_x0(self, eps: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The clean latent x̂_0 that follows from x_t and a noise prediction.

        Raises DiffalignError where ᾱ_t = 0: x_t is then pure noise and does not determine x_0.
        """
        self._needs_signal(t, "predict_x0")
        a, s = self.coefficients(t, xt)
        return (xt - s * eps) / a

    def eps_from_v(self, v: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """ε = a_t v + s_t x_t."""
        a, s = self.coefficients(t, xt)
        return a * v + s * xt

    def v_from_eps(self, eps: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """v = (ε − s_t x_t) / a_t. Raises DiffalignError where ᾱ_t = 0."""
        self._needs_signal(t, "v_from_eps")
        a, s = self.coefficients(t, xt)
        return (eps - s * xt) / a

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The training target at `add_noise(x0, noise, t)`: noise, velocity or sample, as the network predicts."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        a, s = self.coefficients(t, x0)
        return a * noise - s * x0

    def to_eps(self, prediction: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The noise that a network's raw prediction implies."""
        if self.prediction_type == "epsilon":
            return prediction
        if self.prediction_type == "sample":
            return self.implied_noise(prediction, xt, t)
        return self.eps_from_v(prediction, xt, t)

    def to_x0(self, prediction: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The clean latent that a network's raw prediction implies; at ᾱ_t = 0 only v and sample models define it."""
        if self.prediction_type == "epsilon":
            return self.predict_x0(prediction, xt, t)
        if self.prediction_type == "sample":
            return prediction
        a, s = self.coefficients(t, xt)
        return a * xt - s * prediction

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio ᾱ_t / (1−ᾱ_t), float64, shaped like t."""
        alpha_bar = self.alpha_bar(t)
        return alpha_bar / (1 - alpha_bar)

    def timesteps(self, steps: int, spacing: str | None = None, steps_offset: int | None = None) -> Tensor:
        """The timesteps of a diffusers sampler with `steps` steps: int64 [steps], noisiest first.

        Spacing (Lin et al., arXiv 2305.08891, Table 2) and offset default to those of this schedule.
        Raises DiffalignError for an unknown spacing, and for a number of steps outside 1 … T.
        """
        T = self.num_train_timesteps
        spacing = one_of("spacing", spacing or self.timestep_spacing, SPACINGS)
        offset = self.steps_offset if steps_offset is None else steps_offset
        if not 1 <= steps <= T:
            raise DiffalignError(f"steps = {steps}: this schedule allows 1 to {T} steps")
        index = torch.arange(steps, dtype=torch.int64).flip(0)
        if spacing == "leading":
            return (index * (T // steps) + offset).clamp(max=T - 1)
        if spacing == "trailing":
            return ((index + 1).double() * (T / steps)).round().long() - 1
        return torch.linspace(0, T - 1, steps, dtype=torch.float64).round().long().flip(0)

    def _needs_signal(self, t: Tensor, what: str) -> None:
        if float(self.alphas_cumprod[-1]) == 0.0 and bool((self.alpha_bar(t) == 0).any()):
            raise DiffalignError(
                f"{what} is undefined at zero terminal SNR (ᾱ_t = 0), where x_t is pure noise; use to_x0 with a model "
                "that predicts v or the sample, or stop one step earlier"
            )


def spread(coefficient: Tensor, like: Tensor) -> Tensor:
    """A coefficient per sample, shaped to multiply `like`: trailing axes of size 1, its device, float32 or better.

    Raises DiffalignError if the coefficient's axes are not the leading axes of `like`.
    """
    n = coefficient.ndim
    if coefficient.shape != like.shape[:n]:
        raise DiffalignError(
            f"timesteps of shape {tuple(coefficient.shape)} do not match the leading axes of latents of shape "
            f"{tuple(like.shape)}; give one timestep per sample, expanded over the side axis if both sides share it"
        )
    dtype = torch.promote_types(like.dtype, torch.float32)
    return coefficient.to(like.device, dtype, non_blocking=True).reshape(coefficient.shape + (1,) * (like.ndim - n))
