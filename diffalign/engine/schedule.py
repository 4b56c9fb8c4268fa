"""The noise schedule: the table of ᾱ_t in float64, conversions between predictions, sampling grids and SNR.

    x_t = a_t x_0 + s_t ε,   a_t = √ᾱ_t,   s_t = √(1−ᾱ_t),   v = a_t ε − s_t x_0   (Salimans & Ho, arXiv 2202.00512)

Timesteps are int64 and stand for the leading axes of the latents they belong to: t "n" goes with x "n c h w", and
t "side pair" with x "side pair c h w". A 0-dimensional t serves every sample. Coefficients are looked up and
combined in float64 and cast once, to the latents' dtype (float32 at least).

Left out: continuous-time and flow schedules; the models tuned here are trained on a discrete table.
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
    """A trained model's ᾱ table with everything that follows from it."""

    alphas_cumprod: Tensor  # float64 [T]
    final_alpha_cumprod: float = 1.0  # ᾱ "before" t = 0, used for any timestep below 0
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
        """The schedule described by a diffusers scheduler config, its table computed in float64.

        Keys that are missing have the defaults of the class in `_class_name`; without a class, betas must be given.
        Keys that do not concern the table, the prediction type or the sampling grid are none of its business.

        Raises ValueError for a class or keys of noise without such a table (EDM, flow matching, unknown classes),
        missing betas, and a beta schedule, prediction type or spacing that is not known here.
        """
        config = completed(config)
        return cls._with_grid(alphas_cumprod(config), config)

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule of a diffusers scheduler object: its own float32 table, cast to float64.

        With zero terminal SNR, Euler-type schedulers keep 2^-24 in its last place; `from_config` has the exact 0.

        Raises ValueError as `from_config` does; a subclass counts as the class it is derived from.
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
        """ᾱ_t in float64, shaped and placed like t; a negative t gives the final ᾱ.

        Raises TypeError unless t is int64, ValueError for t ≥ T (checked where reading it costs no device sync).
        """
        if not isinstance(t, Tensor):
            raise TypeError(f"timesteps must be an int64 tensor, got {t!r}; torch.tensor({t!r}) serves every sample")
        if t.dtype != torch.int64:
            raise TypeError(
                f"timesteps must be int64, got {t.dtype}; half-precision timesteps hit wrong entries of the table"
            )
        if t.device.type == "cpu" and t.numel() and int(t.max()) >= self.num_train_timesteps:
            raise DiffalignError(
                f"timestep {int(t.max())} is outside this schedule: allowed are 0 … {self.num_train_timesteps - 1}"
            )
        table = self.alphas_cumprod.to(t.device)
        return torch.where(t < 0, self.final_alpha_cumprod, table[t.clamp(min=0)])

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t, shaped to multiply `like` and in its device and dtype (float32 at least)."""
        alpha_bar = self.alpha_bar(t)
        return spread(alpha_bar.sqrt(), like), spread((1 - alpha_bar).sqrt(), like)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = a_t x_0 + s_t ε."""
        a, s = self.coefficients(t, x0)
        return a * x0 + s * noise

    def implied_noise(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The noise for which `add_noise(x0, noise, t)` is xt: whatever explains xt, in general no normal draw."""
        a, s = self.coefficients(t, x0)
        return (xt - a * x0) / s

    def predict_x0(self, eps: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The clean latent that x_t and a noise prediction stand for.

        Raises ValueError where ᾱ_t = 0: x_t is then noise alone and says nothing of x_0.
        """
        self._needs_signal(t, "predict_x0")
        a, s = self.coefficients(t, xt)
        return (xt - s * eps) / a

    def eps_from_v(self, v: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """ε = a_t v + s_t x_t."""
        a, s = self.coefficients(t, xt)
        return a * v + s * xt

    def v_from_eps(self, eps: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """v = (ε − s_t x_t) / a_t. Raises ValueError where ᾱ_t = 0."""
        self._needs_signal(t, "v_from_eps")
        a, s = self.coefficients(t, xt)
        return (eps - s * xt) / a

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect network answers at `add_noise(x0, noise, t)`, in its own prediction type."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        a, s = self.coefficients(t, x0)
        return a * noise - s * x0

    def to_eps(self, prediction: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """A network's raw prediction expressed as noise."""
        if self.prediction_type == "epsilon":
            return prediction
        if self.prediction_type == "sample":
            return self.implied_noise(prediction, xt, t)
        return self.eps_from_v(prediction, xt, t)

    def to_x0(self, prediction: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """A network's raw prediction expressed as a clean latent; defined at ᾱ_t = 0 for v and sample models."""
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
        """The int64 grid of `steps` timesteps that a diffusers sampler visits, noisiest first.

        Spacing and offset default to the model's own (Lin et al., arXiv 2305.08891, Table 2).
        """
        T = self.num_train_timesteps
        spacing = one_of("spacing", spacing or self.timestep_spacing, SPACINGS)
        offset = self.steps_offset if steps_offset is None else steps_offset
        if not 1 <= steps <= T:
            raise DiffalignError(f"steps = {steps}: a grid on this schedule has between 1 and {T} steps")
        index = torch.arange(steps, dtype=torch.int64).flip(0)
        if spacing == "leading":
            return (index * (T // steps) + offset).clamp(max=T - 1)
        if spacing == "trailing":
            return ((index + 1).double() * (T / steps)).round().long() - 1
        return torch.linspace(0, T - 1, steps, dtype=torch.float64).round().long().flip(0)

    def _needs_signal(self, t: Tensor, what: str) -> None:
        if float(self.alphas_cumprod[-1]) == 0.0 and bool((self.alpha_bar(t) == 0).any()):
            raise DiffalignError(
                f"{what} is undefined at zero terminal SNR (ᾱ_t = 0): noise alone says nothing of the image; "
                "use to_x0 with a v- or sample-prediction, or stop one step earlier"
            )


def spread(coefficient: Tensor, like: Tensor) -> Tensor:
    """A per-sample coefficient as a tensor that multiplies `like`: same leading axes, ones behind, its dtype.

    Raises ValueError when the coefficient's axes are not the leading axes of `like`.
    """
    n = coefficient.ndim
    if coefficient.shape != like.shape[:n]:
        raise DiffalignError(
            f"timesteps of shape {tuple(coefficient.shape)} do not lead latents of shape {tuple(like.shape)}; "
            "give one timestep per sample (expand it over the side axis where sides share it)"
        )
    dtype = torch.promote_types(like.dtype, torch.float32)
    return coefficient.to(like.device, dtype, non_blocking=True).reshape(coefficient.shape + (1,) * (like.ndim - n))
