"""Is the world fair to methods that invert images? Two properties, by quarter of t.

    python -m diffalign.world.fairness

Inversion methods take an image to the noise that the base itself would make it from, and compare the two sides
there. That asks two things of a world: the noise found is near what the base was trained on (unit variance), and
the side that is easier to denoise is the same at inverted points as at random noise.
Unit variance cannot be had where the noise is not much larger than the texture, whatever the base: `texture_std` is
what a perfect base would find. A figure near it says that the base has learned its data, not that something is wrong.
Left out: how gradients at inverted points relate to DPO's, which is a property of a method as much as of the world.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from diffalign.engine import ddim
from diffalign.engine.schedule import NoiseSchedule
from diffalign.world import base_path
from diffalign.world.base_model import TIME_IDS, embed
from diffalign.world.pairs import Pair, PairRecipe, make_pairs
from diffalign.world.render import GRAIN_FLOOR, SIZE, SMOOTH_FLOOR, SMOOTH_PASSES
from diffalign.world.vae import SCALING, to_latents

QUARTERS = 4


@dataclass(frozen=True)
class Quarter:
    """Means over pairs at t drawn from one quarter of the schedule; side 0 chosen, 1 rejected."""

    low: int
    high: int
    noise_std: tuple[float, float]  # of the inverted noise; 1 is what the base was trained on
    texture_std: float  # the same for a perfect base and clean texture
    inverted_error: tuple[float, float]  # of the base's noise prediction at inverted points
    random_error: tuple[float, float]  # the same at random noise


@torch.no_grad()
def measure(
    pipe: StableDiffusionXLPipeline, pairs: Sequence[Pair], *, stride: int = 50, seed: int = 0
) -> list[Quarter]:
    """The four quarters, each with every pair at one t of its own; `stride` is the inversion's step in t."""
    schedule = NoiseSchedule.from_diffusers(pipe.scheduler)
    sides = [np.stack([p.pictures[0 if p.first_is_better == chosen else 1] for p in pairs]) for chosen in (True, False)]
    pixels = torch.from_numpy(np.concatenate(sides)).permute(0, 3, 1, 2) / 127.5 - 1
    x0 = to_latents(pipe.vae, pixels)  # (side pair) 12 8 8
    embeds, pooled = embed(pipe, [p.caption for p in pairs])
    embeds = embeds.repeat(2, 1, 1)
    added = {
        "text_embeds": pooled.repeat(2, 1),
        "time_ids": torch.tensor([TIME_IDS], dtype=torch.float32).expand(len(x0), -1),
    }

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return pipe.unet(x, t, embeds, added_cond_kwargs=added).sample

    def error(noise: Tensor, t: Tensor) -> tuple[float, float]:
        squared = (eps(schedule.add_noise(x0, noise, t), t) - noise).square().mean((1, 2, 3)).reshape(2, -1)
        return float(squared[0].mean()), float(squared[1].mean())

    generator = torch.Generator().manual_seed(seed)
    width = schedule.num_train_timesteps // QUARTERS
    found = []
    for low in range(0, schedule.num_train_timesteps, width):
        t = torch.randint(low, low + width, (len(pairs),), generator=generator).repeat(2)
        inverted = schedule.implied_noise(x0, ddim.invert(schedule, eps, x0, t, stride=stride), t)
        std = inverted.reshape(2, -1).std(1)
        noise = torch.randn(x0[: len(pairs)].shape, generator=generator).repeat(2, 1, 1, 1)
        found.append(
            Quarter(
                low=low,
                high=low + width,
                noise_std=(float(std[0]), float(std[1])),
                texture_std=texture_std(schedule, low, low + width),
                inverted_error=error(inverted, t),
                random_error=error(noise, t),
            )
        )
    return found


def texture_std(schedule: NoiseSchedule, low: int, high: int) -> float:
    """Std of inverted noise for data that are Gaussian with the texture's spectrum, over t in [low, high).

    A Fourier mode of variance v follows the probability-flow ODE as x_t = α x_0 sqrt(v + σ²) / sqrt(v) with
    σ² = 1/ᾱ - 1, so its implied noise (x_t / α - x_0) / σ has std (sqrt(v + σ²) - sqrt(v)) / σ: below 1, and the
    further the smaller σ is against the texture.
    """
    response = np.cos(np.fft.fftfreq(SIZE) * np.pi) ** (2 * SMOOTH_PASSES)  # of the 1-2-1 kernel, repeated
    power = np.outer(response, response) ** 2
    per_pixel = GRAIN_FLOOR**2 + SMOOTH_FLOOR**2 * power / power.mean()
    v = (per_pixel * (2 * SCALING) ** 2).reshape(-1, 1)  # pixels in [0, 1] to scaled latents
    sigma = (1 / schedule.alphas_cumprod[low:high].numpy() - 1) ** 0.5
    return float(np.mean(((v + sigma**2) ** 0.5 - v**0.5) ** 2 / sigma**2) ** 0.5)


def table(quarters: Sequence[Quarter]) -> str:
    """The quarters as a Markdown table, chosen / rejected in each cell."""
    head = ("t", "std of inverted noise", "of a perfect base", "error at inverted points", "error at random noise")
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|"]
    for q in quarters:
        std, inverted, random = (
            f"{pair[0]:.{digits}f} / {pair[1]:.{digits}f}"
            for pair, digits in ((q.noise_std, 2), (q.inverted_error, 4), (q.random_error, 4))
        )
        lines.append(f"| {q.low}-{q.high} | {std} | {q.texture_std:.2f} | {inverted} | {random} |")
    return "\n".join(lines)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m diffalign.world.fairness", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--source", choices=("renders", "samples"), default="renders")
    parser.add_argument("--stride", type=int, default=50, help="inversion step in t")
    a = parser.parse_args()
    pipe = StableDiffusionXLPipeline.from_pretrained(base_path())
    print(table(measure(pipe, make_pairs(PairRecipe(n=a.pairs, seed=1, source=a.source)), stride=a.stride)))


if __name__ == "__main__":
    main()
