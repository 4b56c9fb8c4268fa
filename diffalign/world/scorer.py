"""The world's oracle as scorers, on the CPU, and its step-aware preference model, which had to learn the same taste."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.world import oracle
from diffalign.world.captions import Combination, parse
from diffalign.world.render import SIZE

T = TypeVar("T")


class OfCaptions:
    """A scorer by the oracle: prompts are the world's captions."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """ValueError for a prompt that is no caption of the world."""
        for prompt in prompts:
            parse(prompt)


class WorldReward(OfCaptions):
    """Faithfulness + vividness - 4 x excess grain: the reward that pairs of the world are labelled by."""

    name = "world"
    span = (-0.5, 2.0)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Rewards [n] float32, about -0.5 (noise) to 1.9 (clean and fully vivid). ValueError as in `read_images`."""
        return oracle.reward(*read_images(images, prompts))


class WorldSize(OfCaptions):
    """Faithfulness + size of the shape: a second taste that nothing in the package is tuned on."""

    name = "world-size"
    span = (0.0, 2.0)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Rewards [n] float32 in [0, 2]. ValueError as in `read_images`."""
        return oracle.size_reward(*read_images(images, prompts))


class WorldBold(OfCaptions):
    """Faithfulness + taste for the large and vivid - 4 x excess grain: what the world's user `bold` prefers by."""

    name = "world-bold"
    span = (-1.5, 2.0)
    taste = 1.0

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Rewards [n] float32, about -1.5 to 2. ValueError as in `read_images`."""
        reading, wanted = read_images(images, prompts)
        return oracle.taste_reward(reading, wanted, torch.full((len(wanted),), self.taste))


class WorldQuiet(WorldBold):
    """The same with a taste for the small and muted: the world's user `quiet`."""

    name = "world-quiet"
    taste = -1.0


class WorldAccuracy(OfCaptions):
    """1 where shape, colour and background are all as captioned, else 0."""

    name = "world-accuracy"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Zeros and ones [n] float32. ValueError as in `read_images`."""
        return oracle.accuracy(*read_images(images, prompts))


def read_images(images: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[oracle.Reading, list[Combination]]:
    """What the oracle sees in the images and what their prompts ask for.

    ValueError when there are not as many prompts as images, when an image is not 16x16, or when a prompt is no
    caption of the world.
    """
    wanted = wanted_of(images, prompts, parse)
    return oracle.read(pixels(images, SIZE, "embedded")), wanted


def wanted_of(images: Sequence[Image.Image], prompts: Sequence[str], parse: Callable[[str], T]) -> list[T]:
    """What the prompts of some images ask for. Raises DiffalignError unless there are as many prompts as images."""
    if len(images) != len(prompts):
        raise DiffalignError(f"{len(images)} images but {len(prompts)} prompts; give one prompt per image")
    return [parse(prompt) for prompt in prompts]


def pixels(images: Sequence[Image.Image], size: int, world: str) -> Tensor:
    """The images as uint8 "n h w 3". Raises DiffalignError for one that is not `size` pixels wide and high."""
    for i, image in enumerate(images):
        if image.size != (size, size):
            raise DiffalignError(
                f"image {i} is {image.size[0]}x{image.size[1]}; images of the {world} world are {size}x{size}. "
                f"Generate with resolution {size}; do not resize"
            )
    if not images:
        return torch.empty(0, size, size, 3, dtype=torch.uint8)
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
