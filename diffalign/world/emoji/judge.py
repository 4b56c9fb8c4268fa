"""The judge of the emoji world: a small convolutional network that names the thing and the style of an image.

    python -m diffalign.world.emoji.judge --out assets/emoji/judge

It is trained on drawings on backgrounds of any colour, never on images of a base, and is no preference model: `reward`
reads its answer. A quarter of its training images pass through the autoencoder, all are disturbed in colour, sharpness
and grain, and a fifth show nothing known (plain backgrounds, noise, shuffled patches, halves of two things), so that it
may answer "nothing". RECIPE.json beside the weights has its accuracy on renders, whose eight backgrounds it never saw.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from diffalign.world.emoji import asset
from diffalign.world.emoji.captions import SPLITS, STYLES, THINGS, Combination, combinations
from diffalign.world.emoji.render import BACKGROUND, SIZE, Looks, draw_looks, paint
from diffalign.world.emoji.vae import fitted_vae, to_latents, to_pixels

WIDTHS = (24, 48, 96, 128)
NOTHING = len(THINGS)  # the class of images that show none of the things


class Judge(nn.Module):
    """Logits of the thing (24 and "nothing") and of the style (3) of pixels "n 3 64 64" in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, wider in zip((3, *WIDTHS), WIDTHS):
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.GroupNorm(8, wider), nn.SiLU()]
        layers += [nn.Conv2d(WIDTHS[-1], WIDTHS[-1], 3, padding=1), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.thing = nn.Linear(2 * WIDTHS[-1], len(THINGS) + 1)
        self.style = nn.Linear(2 * WIDTHS[-1], len(STYLES))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.features(pixels)
        pooled = torch.cat([seen.mean((2, 3)), seen.amax((2, 3))], dim=1)
        return self.thing(pooled), self.style(pooled)


@dataclass(frozen=True)
class Recipe:
    """How the committed judge was trained: one cosine decay of the learning rate to 0."""

    seed: int = 0
    steps: int = 1200
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup: int = 100  # steps
    nothing: float = 0.2  # share of images that show none of the things


@cache
def judge() -> Judge:
    """The committed judge, in eval mode, on the CPU."""
    made = Judge()
    made.load_state_dict({k: v.float() for k, v in load_file(asset("judge/model.safetensors")).items()})
    return made.eval().requires_grad_(False)


def train(recipe: Recipe) -> Judge:
    """A judge trained on disturbed drawings, on backgrounds of any colour, and on images of nothing."""
    torch.manual_seed(recipe.seed)
    rng, vae, network = np.random.default_rng(recipe.seed), fitted_vae(), Judge().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    known = combinations("train")  # each thing alike
    began, losses = time.monotonic(), []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            rise = min(1.0, (step + 1) / recipe.warmup)
            group["lr"] = recipe.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        wanted = [known[i] for i in rng.integers(0, len(known), recipe.batch)]
        looks = _any_background(draw_looks(wanted, rng), wanted, rng)
        pixels = to_pixels(paint(wanted, looks))
        pixels[::4] = vae.decode(to_latents(vae, pixels[::4])).sample
        thing = torch.tensor([THINGS.index(c.thing) for c in wanted])
        empty = torch.from_numpy(rng.random(recipe.batch) < recipe.nothing)
        pixels[empty] = _nothing(pixels, rng)[empty]
        thing[empty] = NOTHING
        things, styles = network(_disturbed(pixels, rng))
        loss = functional.cross_entropy(things, thing)
        loss = loss + functional.cross_entropy(styles[~empty], torch.from_numpy(looks.style)[~empty])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            recent = float(np.mean(losses[-250:]))
            print(f"step {step + 1}/{recipe.steps}  loss {recent:.4f}  {time.monotonic() - began:.0f} s", flush=True)
    return network.eval()


def _any_background(looks: Looks, wanted: Sequence[Combination], rng: np.random.Generator) -> Looks:
    """The looks with backgrounds of any colour, so that no background speaks for or against a thing."""
    named = np.array([BACKGROUND[c.background] for c in wanted])
    return replace(looks, tint=rng.uniform(0, 255, named.shape) - named)


def _nothing(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Images that show none of the things, one of four kinds for each of `pixels`."""
    n = len(pixels)
    kind = torch.from_numpy(rng.integers(0, 4, n))[:, None, None, None]
    plain = pixels[:, :, :1, :1].expand_as(pixels)
    noise = torch.from_numpy(rng.uniform(-1, 1, pixels.shape)).float()
    patches = pixels.unflatten(3, (4, SIZE // 4)).unflatten(2, (4, SIZE // 4)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    shuffled = torch.stack([p[torch.from_numpy(rng.permutation(16))] for p in patches])
    shuffled = shuffled.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    halves = torch.cat([pixels[..., : SIZE // 2], pixels.roll(1, 0)[..., SIZE // 2 :]], dim=3)
    return torch.where(kind == 0, plain, torch.where(kind == 1, noise, torch.where(kind == 2, shuffled, halves)))


def _disturbed(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """The images with other brightness, contrast and tint, mirrored or not, and with grain."""
    n = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (n, *shape))).float()

    pixels = pixels * uniform(0.8, 1.2, 1, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1)
    grain = uniform(0, 0.15, 1, 1, 1) * torch.from_numpy(rng.standard_normal(pixels.shape)).float()
    mirrored = torch.from_numpy(rng.random(n) < 0.25)[:, None, None, None]
    pixels = torch.where(mirrored, pixels.flip(3), pixels)
    return (pixels + grain).clamp(-1, 1)


@torch.no_grad()
def accuracy(network: Judge, split: str, n: int, seed: int = 1) -> dict[str, float]:
    """Share of n renders of a split, vivid or pale, sharp or blurred, whose thing and style the judge names."""
    rng = np.random.default_rng(seed)
    known = combinations(split)
    wanted: list[Combination] = [known[i % len(known)] for i in range(n)]
    looks = draw_looks(wanted, rng)
    images: NDArray[np.uint8] = paint(wanted, looks)
    things, styles = network(to_pixels(images))
    thing = things.argmax(1) == torch.tensor([THINGS.index(c.thing) for c in wanted])
    style = styles.argmax(1) == torch.from_numpy(looks.style)
    return {
        "thing": round(thing.float().mean().item(), 4),
        "style": round(style.float().mean().item(), 4),
    }


def build(folder: Path, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Trains by the recipe, writes weights (float16) and RECIPE.json into `folder`, and returns the accuracy."""
    network = train(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, folder / "model.safetensors")
    figures = {split: accuracy(network, split, 4800) for split in SPLITS}
    made = {
        "command": f"python -m diffalign.world.emoji.judge --out {folder.as_posix()}",
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in network.parameters()),
        "accuracy on 4,800 renders of each split": figures,
        "versions": {m.__name__: m.__version__ for m in (torch, np)},
    }
    (folder / "RECIPE.json").write_text(json.dumps(made, indent=2) + "\n")
    return figures


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m diffalign.world.emoji.judge", description="train the judge")
    parser.add_argument("--out", required=True, type=Path, help="folder of the weights")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(build(arguments.out, Recipe()), indent=2))


if __name__ == "__main__":
    main()
