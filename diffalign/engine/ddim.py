"""DDIM (Song et al., arXiv 2010.02502) between any two noise levels, per sample, in either direction.

    σ² = η² (1−ᾱ')/(1−ᾱ) · (1−ᾱ/ᾱ')                          (eq. 16; ᾱ at t, ᾱ' at t_prev)
    x' = √ᾱ' x̂_0 + √(1−ᾱ'−σ²) ε + σ z                        (eq. 12)

With η = 0 the step is deterministic and runs backwards as well: from a lower to a higher noise level it is DDIM
inversion, which has a file of its own and shows `invert` here. Functions here never call a network except through an
`eps_fn` that the caller hands in.
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
    """One DDIM step: N(mean, std²) and the point taken from it."""

    prev: Tensor  # "n c h w"
    mean: Tensor  # "n c h w"
    std: Tensor  # [n] (the shape of t), float64
    x0: Tensor  # "n c h w", the clean latent the step aims at


def variance(s: NoiseSchedule, t: Tensor, t_prev: Tensor, eta: float = 1.0) -> Tensor:
    """σ² of the step t → t_prev in float64, shaped like t (eq. 16, times η²).

    0 where both have the same ᾱ: at zero terminal SNR and at a final ᾱ of 1, too, where the formula is 0/0.
    """
    now, prev = s.alpha_bar(t), s.alpha_bar(t_prev)
    sigma2 = eta**2 * (1 - prev) / (1 - now) * (1 - now / prev)
    return torch.where(now == prev, 0.0, sigma2)


def inversion_std(s: NoiseSchedule, ascent: Ascent, eta: float) -> Tensor:
    """Std of the noise that InPO adds after each step of an ascent, float64 [n, k].

    That of the sampling step which would lead to the level just reached from as far above it again (at most T − 1).
    Source: the released code of InPO (arXiv 2503.18454), whose grid lets it look one step ahead.
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
    """Moves x_t to the noise level of t_prev (below 0: the schedule's final ᾱ), each sample on its own t.

    `prev` is mean + std·noise, or the mean where no noise is given. `x0` overrides the clean latent that follows
    from `eps`; pass it where ᾱ_t = 0 (`NoiseSchedule.to_x0`).

    Raises ValueError when η > 0 and t_prev ≥ t: noise can only be added on the way to a cleaner level.
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
    """p and q of `step(...).mean` = p·x_t + q·(the network's raw prediction), float64, shaped like t.

    The mean is affine in the prediction, whatever its type, with a = √ᾱ, s = √(1−ᾱ) and d = √(1−ᾱ'−σ²):

        noise     p = a'/a          q = d − a' s/a
        velocity  p = a a' + s d    q = a d − s a'
        sample    p = d/s           q = a' − a d/s

    Raises ValueError for a noise-predicting network where ᾱ_t = 0: its answer there says nothing of the image.
    """
    now, prev = s.alpha_bar(t), s.alpha_bar(t_prev)
    a, sigma, a_prev = now.sqrt(), (1 - now).sqrt(), prev.sqrt()
    d = (1 - prev - variance(s, t, t_prev, eta)).clamp(min=0).sqrt()
    if s.prediction_type == "v_prediction":
        return a * a_prev + sigma * d, a * d - sigma * a_prev
    if s.prediction_type == "sample":
        return d / sigma, a_prev - a * d / sigma
    if t.device.type == "cpu" and bool((now == 0).any()):
        raise DiffalignError("a network that predicts noise says nothing of the image at zero terminal SNR (ᾱ_t = 0)")
    return a_prev / a, d - a_prev * sigma / a


def log_density(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(sample; mean, std²) averaged over every axis that `std` does not have.

    The mean, not the sum, is the convention of SPO's released code (arXiv 2406.04314); the paper's sum is C·H·W
    times larger. Raises ValueError where std = 0: a deterministic step has no density.
    """
    if std.device.type == "cpu" and bool((std <= 0).any()):
        raise DiffalignError("log_density needs std > 0: take the step with eta > 0 and t_prev ≥ 0")
    sigma = spread(std, sample)
    log_p = -((sample - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return log_p.flatten(std.ndim).mean(-1)


def transition_noise(s: NoiseSchedule, xt: Tensor, x_prev: Tensor, t: Tensor, t_prev: Tensor) -> Tensor:
    """The noise prediction with which a deterministic step takes x_t exactly to x_prev; see `noise_between`."""
    return noise_between(x_prev, xt, s.alpha_bar(t_prev), s.alpha_bar(t))


def sample(
    s: NoiseSchedule, eps_fn: EpsFn, xt: Tensor, steps: int, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """Runs the model's sampling grid from pure noise to a clean latent.

    `noise`, "steps n c h w", is required when η > 0: randomness is the caller's.
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
