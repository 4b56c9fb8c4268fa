"""Where timesteps are drawn, and how much each of them counts: densities and weights over the range of t.

logit-normal    logit(u) ~ N(mean, std²), u the place in the range        (SD3, Esser et al., arXiv 2403.03206)
power           density ∝ u^power; above 0 it prefers high noise
min-SNR         weight min(SNR, γ)/SNR for predictions of noise            (Hang et al., arXiv 2303.09556)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.engine.schedule import NoiseSchedule


@dataclass(frozen=True)
class TimestepDensity:
    """A density of t that is not uniform: logit-normal where `logit_std` is set, else a power."""

    power: float = 0.0
    logit_mean: float = 0.0
    logit_std: float | None = None

    @property
    def drawn(self) -> dict[str, Any]:
        """Its settings by name, for the identity of what was computed at such points."""
        if self.logit_std is None:
            return {"density": "power", "power": self.power}
        return {"density": "logit_normal", "mean": self.logit_mean, "std": self.logit_std}

    def places(self, u: Tensor, count: int) -> Tensor:
        """Indices into `count` timesteps in rising order, int64, from uniform numbers in [0, 1)."""
        if self.logit_std is None:
            at = u ** (1 / (1 + self.power))
        else:
            tiny = torch.finfo(u.dtype).tiny  # the quantile of 0 is −∞
            at = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u.clamp(min=tiny)))
        return (at * count).long().clamp(max=count - 1)


def min_snr(schedule: NoiseSchedule, t: Tensor, gamma: float) -> Tensor:
    """The Min-SNR weight of an error in the network's own prediction space, float64; its limit where SNR is 0.

    min(SNR, γ)/SNR for noise, min(SNR, γ)/(SNR + 1) for velocity, min(SNR, γ) for the sample, as in diffusers' scripts.
    """
    snr = schedule.snr(t)
    if schedule.prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    bounded = snr.clamp(max=gamma)
    return bounded / (snr + 1) if schedule.prediction_type == "v_prediction" else bounded


def power_weight(schedule: NoiseSchedule, t: Tensor, power: float) -> Tensor:
    """((t + 1)/T)^power, float64, divided by its mean over all t: above 0 it prefers high noise."""
    T = schedule.num_train_timesteps
    every = ((torch.arange(T, dtype=torch.float64) + 1) / T) ** power
    return every[t.cpu()].to(t.device) / every.mean()
