"""Is the world fair to methods that invert images? Two properties, by quarter of t.

    python -m diffalign.world.fairness
    python -m diffalign.world.fairness --emoji --source samples --pairs 48 --stride 25

Inversion methods take an image to the noise that the base itself would make it from, and compare the two sides
there. That asks two things of a world: the noise found is near what the base was trained on (unit variance), and
the side that is easier to denoise is the same at inverted points as at random noise.
Unit variance cannot be had where the noise is not much larger than the texture, whatever the base: `texture_std` is
what a perfect base would find. A figure near it says that the base has learned its data, not that something is wrong.
The emoji world has no texture, so nothing is computed for a perfect base there.
Left out: how gradients at inverted points relate to DPO's, which is a property of a method as much as of the world.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import StableDiffusionXLPipeline
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffalign.engine import ddim
from diffalign.engine.schedule import NoiseSchedule
from diffalign.world import base_path, emoji
from diffalign.world.base_model import embed
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
    texture_std: float | None  # the same for a perfect base and clean texture; None for images without one
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
    x0 = to_latents(pipe.vae, pixels)  # (side pair) channel height width
    embeds, pooled = embed(pipe, [p.caption for p in pairs])
    embeds, side = embeds.repeat(2, 1, 1), pixels.shape[-1]
    added = {
        "text_embeds": pooled.repeat(2, 1),
        # Original size, crop and target size, as both worlds' bases were trained.
        "time_ids": torch.tensor([(side, side, 0, 0, side, side)], dtype=torch.float32).expand(len(x0), -1),
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
                texture_std=texture_std(schedule, low, low + width) if side == SIZE else None,
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
    lines = []
    for q in quarters:
        std, inverted, random = (
            f"{pair[0]:.{digits}f} / {pair[1]:.{digits}f}"
            for pair, digits in ((q.noise_std, 2), (q.inverted_error, 4), (q.random_error, 4))
        )
        cells = {"t": f"{q.low}-{q.high}", "std of inverted noise": std}
        if q.texture_std is not None:
            cells["of a perfect base"] = f"{q.texture_std:.2f}"
        cells |= {"error at inverted points": inverted, "error at random noise": random}
        lines.append(cells)
    head = list(lines[0])
    rows = (f"| {' | '.join(cells)} |" for cells in (head, *(line.values() for line in lines)))
    first, *rest = rows
    return "\n".join([first, "|" + "---|" * len(head), *rest])


def committed_pairs(file: Path, n: int) -> list[Pair]:
    """The first n pairs of a parquet file in Pick-a-Pic's columns that has true rewards, as `world.pairs` writes it."""

    def pixels(png_or_jpeg: bytes) -> NDArray[np.uint8]:
        return np.asarray(Image.open(io.BytesIO(png_or_jpeg)).convert("RGB"))

    return [
        Pair(
            row["caption"],
            (pixels(row["jpg_0"]), pixels(row["jpg_1"])),
            (row["score_0"], row["score_1"]),
            row["label_0"] == 1.0,
            row["image_0_uid"],
        )
        for row in pq.read_table(file).slice(0, n).to_pylist()
    ]


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m diffalign.world.fairness", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--source", choices=("renders", "samples"), default="renders")
    parser.add_argument("--stride", type=int, default=50, help="inversion step in t")
    parser.add_argument("--emoji", action="store_true", help="the emoji world's base and its committed pairs")
    a = parser.parse_args()
    if a.emoji:
        base, pairs = emoji.base_path(), committed_pairs(emoji.asset(f"pairs/{a.source}.parquet"), a.pairs)
    else:
        base, pairs = base_path(), make_pairs(PairRecipe(n=a.pairs, seed=1, source=a.source))
    print(table(measure(StableDiffusionXLPipeline.from_pretrained(base), pairs, stride=a.stride)))


if __name__ == "__main__":
    main()
