"""DDIM (Song et al., arXiv 2010.02502) between any two noise levels, per sample, in either direction.

    σ² = η² (1−ᾱ')/(1−ᾱ) · (1−ᾱ/ᾱ')                          (eq. 16; ᾱ at t, ᾱ' at t_prev)
    x' = √ᾱ' x̂_0 + √(1−ᾱ'−σ²) ε + σ z                        (eq. 12)

With η = 0 the step is deterministic, and also runs backwards: from a lower to a higher noise level it is DDIM inversion
(`inversion.py`, whose `invert` can be imported from here). No function here calls a network, except through an `eps_fn`
that the caller passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.engine.inversion import Ascent, EpsFn, invert, noise_between
from diffalign.engine.schedule import NoiseSchedule, spread
from diffalign.errors import DiffalignError

__all__ = [
    "EpsFn",
    "Step",
    "inversion_std",
    "invert",
    "log_density",
    "mean_of_prediction",
    "sample",
    "step",
    "transition_noise",
    "variance",
]


@dataclass(frozen=True)
class Step:
    """One DDIM step: the distribution N(mean, std²) and one point of it."""

    prev: Tensor  # "n c h w"
    mean: Tensor  # "n c h w"
    std: Tensor  # [n] (the shape of t), float64
    x0: Tensor  # "n c h w", the predicted clean latent


def variance(s: NoiseSchedule, t: Tensor, t_prev: Tensor, eta: float = 1.0) -> Tensor:
    """σ² of the step t → t_prev in float64, shaped like t (eq. 16, times η²).

    0 where t and t_prev have the same ᾱ, also where the formula is 0/0: at zero terminal SNR and at a final ᾱ of 1.
    """
    now, prev = s.alpha_bar(t), s.alpha_bar(t_prev)
    sigma2 = eta**2 * (1 - prev) / (1 - now) * (1 - now / prev)
    return torch.where(now == prev, 0.0, sigma2)


def inversion_std(s: NoiseSchedule, ascent: Ascent, eta: float) -> Tensor:
    """Standard deviation of the noise that InPO adds after each step of an ascent, float64 [n, k].

    It is that of the sampling step that would end at the level just reached. That step starts as far above this level
    as the inversion step started below it, at most at T − 1. Source: the released code of InPO (arXiv 2503.18454).
    """
    above = (2 * ascent.high - ascent.low).clamp(max=s.num_train_timesteps - 1)
    return variance(s, above, ascent.high, eta).sqrt()


def step(
    s: NoiseSchedule,
    eps: Tensor,
    xt: Tensor,
    t: Tensor,
    t_prev: Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
    x0: Tensor | None = None,
) -> Step:
    """Moves x_t "n c h w" to the noise level of t_prev, each sample with its own t and t_prev, int64 [n].

    A negative t_prev means the schedule's final ᾱ. `prev` is mean + std·noise, or the mean if `noise` is None. `x0`
    replaces the clean latent that follows from `eps`; it is needed where ᾱ_t = 0 (`NoiseSchedule.to_x0`).

    Raises DiffalignError for a negative η, and for η > 0 with t_prev ≥ t: inversion steps are deterministic.
    """
    if eta < 0:
        raise DiffalignError(f"eta = {eta} is negative; 0 is deterministic DDIM, 1 has the variance of DDPM")
    if eta > 0 and t.device.type == "cpu" and bool((t_prev >= t).any()):
        raise DiffalignError("eta > 0 needs t_prev < t for every sample; inversion steps are deterministic")
    x0 = s.predict_x0(eps, xt, t) if x0 is None else x0
    prev = s.alpha_bar(t_prev)
    sigma2 = variance(s, t, t_prev, eta) if eta else torch.zeros_like(prev)
    direction = (1 - prev - sigma2).clamp(min=0).sqrt()  # rounding may take 1−ᾱ'−σ² a hair below 0
    mean = spread(prev.sqrt(), xt) * x0 + spread(direction, xt) * eps
    std = sigma2.sqrt()
    moved = mean if noise is None else mean + spread(std, xt) * noise
    return Step(prev=moved, mean=mean, std=std, x0=x0)


def mean_of_prediction(s: NoiseSchedule, t: Tensor, t_prev: Tensor, eta: float = 0.0) -> tuple[Tensor, Tensor]:
    """p and q with `step(...).mean` = p·x_t + q·(the network's raw prediction), float64, shaped like t.

    The mean is affine in every type of prediction. With a = √ᾱ, s = √(1−ᾱ) and d = √(1−ᾱ'−σ²):

        noise     p = a'/a          q = d − a' s/a
        velocity  p = a a' + s d    q = a d − s a'
        sample    p = d/s           q = a' − a d/s

    Raises DiffalignError where ᾱ_t = 0 and the network predicts noise: x_0 does not follow from such a prediction.
    """
    now, prev = s.alpha_bar(t), s.alpha_bar(t_prev)
    a, sigma, a_prev = now.sqrt(), (1 - now).sqrt(), prev.sqrt()
    d = (1 - prev - variance(s, t, t_prev, eta)).clamp(min=0).sqrt()
    if s.prediction_type == "v_prediction":
        return a * a_prev + sigma * d, a * d - sigma * a_prev
    if s.prediction_type == "sample":
        return d / sigma, a_prev - a * d / sigma
    if t.device.type == "cpu" and bool((now == 0).any()):
        raise DiffalignError(
            "a prediction of noise does not determine the image at zero terminal SNR (ᾱ_t = 0); use a model that "
            "predicts v or the sample, or stop one step earlier"
        )
    return a_prev / a, d - a_prev * sigma / a


def log_density(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(sample; mean, std²), the mean over all axes that `std` [n] does not have.

    The mean is the convention of SPO's released code (arXiv 2406.04314). The paper's sum is C·H·W times as large.
    Raises DiffalignError where std = 0: a deterministic step has no density.
    """
    if std.device.type == "cpu" and bool((std <= 0).any()):
        raise DiffalignError("log_density needs std > 0: take the step with eta > 0 and t_prev ≥ 0")
    sigma = spread(std, sample)
    log_p = -((sample - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return log_p.flatten(std.ndim).mean(-1)


def transition_noise(s: NoiseSchedule, xt: Tensor, x_prev: Tensor, t: Tensor, t_prev: Tensor) -> Tensor:
    """The noise prediction with which a deterministic step leads exactly from x_t to x_prev; see `noise_between`."""
    return noise_between(x_prev, xt, s.alpha_bar(t_prev), s.alpha_bar(t))


def sample(
    s: NoiseSchedule, eps_fn: EpsFn, xt: Tensor, steps: int, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """Samples clean latents "n c h w" from pure noise, on the sampling grid of the schedule.

    With η > 0 the caller draws the `noise`, "steps n c h w". Raises DiffalignError if it is missing.
    """
    if eta > 0 and noise is None:
        raise DiffalignError("sample with eta > 0 needs noise of shape [steps, n, c, h, w]")
    grid = s.timesteps(steps)
    following = torch.cat([grid[1:], grid.new_full((1,), -1)])
    for i, (t, t_prev) in enumerate(zip(grid, following, strict=True)):
        t_all, prev_all = t.expand(len(xt)), t_prev.expand(len(xt))
        z = None if noise is None else noise[i]
        xt = step(s, eps_fn(xt, t_all), xt, t_all, prev_all, eta, z).prev
    return xt
