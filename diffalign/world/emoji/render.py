"""Renders of the emoji world: 64x64 RGB, one drawing on a plain background.

A caption never says how large the drawing is, where it stands, how vivid or how sharp it is, or which tint the
background has. Resizing is Pillow's, in integers, and the rest is numpy: the same generator state gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.world.emoji.art import drawings
from diffalign.world.emoji.captions import BACKGROUNDS, STYLES, THINGS, Combination

SIZE = 64  # pixels
BACKGROUND = {  # RGB, 0 to 255
    "white": (243, 243, 243),
    "black": (28, 28, 30),
    "grey": (132, 134, 138),
    "blue": (66, 118, 218),
    "green": (78, 172, 100),
    "yellow": (248, 214, 92),
    "pink": (246, 164, 200),
    "purple": (132, 86, 190),
}
LUMA = (0.299, 0.587, 0.114)

EXTENT = (42, 58)  # pixels of the longer side, both ends included
OFFSET = 4  # pixels from the centre, either way, per axis; less where the drawing would leave the image
TINT = 8  # of 255, of the background, either way, per channel
VIVIDNESS = (0.3, 1.0)  # 1: the colours of the art; 0: their grey
BLUR_RATE, BLUR_PASSES = 0.35, 6  # share of blurred images, and the most passes of the 1-2-1 kernel


@dataclass(frozen=True)
class Looks:
    """What a caption leaves open, for n images; arrays of length n unless said otherwise."""

    style: NDArray[np.int64]  # index of captions.STYLES; the caption's own where it names one
    extent: NDArray[np.int64]  # pixels
    offset: NDArray[np.int64]  # [n 2], x and y, pixels
    tint: NDArray[np.float64]  # [n 3], of 255
    vividness: NDArray[np.float64]
    blur: NDArray[np.int64]  # passes of the 1-2-1 kernel, 0 is sharp


def draw_looks(wanted: Sequence[Combination], rng: np.random.Generator) -> Looks:
    """Random looks for images of these combinations."""
    n = len(wanted)
    named = np.array([-1 if c.style is None else STYLES.index(c.style) for c in wanted], dtype=np.int64)
    style = rng.integers(0, len(STYLES), n)
    extent = rng.integers(EXTENT[0], EXTENT[1] + 1, n)
    room = np.minimum((SIZE - extent) // 2, OFFSET)
    offset = np.rint(rng.uniform(-1, 1, (n, 2)) * room[:, None]).astype(np.int64)
    tint = rng.uniform(-TINT, TINT, (n, 3))
    vividness = rng.uniform(*VIVIDNESS, n)
    blur = np.where(rng.random(n) < BLUR_RATE, rng.integers(1, BLUR_PASSES + 1, n), 0)
    return Looks(np.where(named < 0, style, named), extent, offset, tint, vividness, blur)


def render(wanted: Sequence[Combination], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Images [n 64 64 3] of the combinations with random looks."""
    return paint(wanted, draw_looks(wanted, rng))


def paint(wanted: Sequence[Combination], looks: Looks) -> NDArray[np.uint8]:
    """Images [n 64 64 3] of the combinations with these looks."""
    layers = np.zeros((len(wanted), SIZE, SIZE, 4), np.float32)  # premultiplied
    for i, c in enumerate(wanted):
        extent = int(looks.extent[i])
        left, top = (SIZE - extent) // 2 + looks.offset[i]
        layers[i, top : top + extent, left : left + extent] = _scaled(
            THINGS.index(c.thing), int(looks.style[i]), extent
        )
    colour, alpha = layers[..., :3], layers[..., 3:]
    grey = colour @ np.array(LUMA, np.float32)
    vividness = looks.vividness[:, None, None, None].astype(np.float32)
    colour = grey[..., None] + vividness * (colour - grey[..., None])
    back = np.array([BACKGROUND[c.background] for c in wanted]).reshape(-1, 3) + looks.tint
    shade = back[:, None, None].astype(np.float32)
    image = (colour + shade * (1 - alpha / 255)).astype(np.float32)
    return np.rint(np.clip(_blur(image, looks.blur), 0, 255)).astype(np.uint8)


@cache
def _scaled(thing: int, style: int, extent: int) -> NDArray[np.float32]:
    """A drawing [extent extent 4], premultiplied, 0 to 255."""
    small = drawings()[thing][style].resize((extent, extent), Image.Resampling.LANCZOS)
    # numpy reads no RGBa image: its bands are merged under another name.
    return np.asarray(Image.merge("RGBA", small.split()), dtype=np.float32)


def _blur(images: NDArray[np.float32], passes: NDArray[np.int64]) -> NDArray[np.float32]:
    """The 1-2-1 kernel along height and width, `passes` [n] times; edges repeat."""
    images = images.copy()
    x: NDArray[np.float32]
    for number in range(int(passes.max(initial=0))):
        rows = passes > number
        x = images[rows]
        for axis in (1, 2):
            wide = np.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)], mode="edge")
            low, high = np.take(wide, range(SIZE), axis), np.take(wide, range(2, SIZE + 2), axis)
            x = ((low + 2 * x + high) / 4).astype(np.float32)
        images[rows] = x
    return images


def background_table() -> NDArray[np.float32]:
    """Colours [8 3] of the backgrounds in the order of `captions`, in [0, 1]."""
    return np.array([BACKGROUND[b] for b in BACKGROUNDS], np.float32) / np.float32(255)
