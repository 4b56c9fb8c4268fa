"""Renders of the world: 16x16 RGB, an anti-aliased shape on a plain background, and natural texture over everything.

What a caption never says varies: vividness, radius, offset, tint. Some renders have defects; a model trained on
them has something to unlearn. Texture (a smooth field plus white grain) is on every image, because data that
fill the space make inversion-based methods meaningful; docs/world.md has the figures.
Pure numpy, a few ms per hundred images; the same generator state gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from diffalign.world.captions import BACKGROUNDS, COLOURS, SHAPES, Combination

SIZE = 16  # pixels
SUPERSAMPLE = 4  # samples per pixel and axis when a shape is drawn

FOREGROUND = {  # fully vivid, RGB in [0, 1]
    "red": (0.92, 0.12, 0.12),
    "yellow": (0.92, 0.86, 0.10),
    "green": (0.14, 0.78, 0.18),
    "cyan": (0.10, 0.78, 0.88),
    "blue": (0.18, 0.26, 0.94),
    "magenta": (0.88, 0.18, 0.82),
}
PALE = 0.64  # the grey that a colour of vividness 0 would be
BACKGROUND = {  # away from 0 and 1, so that texture is hardly clipped
    "black": (0.15, 0.15, 0.15),
    "grey": (0.38, 0.38, 0.38),
    "white": (0.87, 0.87, 0.87),
    "navy": (0.14, 0.19, 0.50),
    "brown": (0.52, 0.25, 0.17),
}

VIVIDNESS = (0.25, 1.0)
RADIUS = (3.6, 5.4)  # pixels
OFFSET = 1.5  # pixels, either way, per axis
TINT = 0.03  # background tint, either way, per channel

GRAIN_FLOOR = 0.10  # std of the white grain on every image
SMOOTH_FLOOR = 0.05  # std of the smooth field on every image (correlated over about 2 pixels)
SMOOTH_PASSES = 4  # of a 1-2-1 kernel over white noise; _BLURRED_STD belongs to this number

REDRAWN_RATE = 0.18  # one attribute is not the caption's
GRAIN_RATE, GRAIN_EXTRA = 0.35, (0.04, 0.16)  # more grain, std
BLUR_RATE = 0.20  # the drawing (not its texture) is out of focus


@dataclass(frozen=True)
class Looks:
    """What a caption leaves open, per image; arrays of length n unless said otherwise."""

    vividness: NDArray[np.float64]
    radius: NDArray[np.float64]  # pixels
    offset: NDArray[np.float64]  # [n 2], x and y from the centre, pixels
    tint: NDArray[np.float64]  # [n 3]
    redrawn: NDArray[np.int64]  # -1, or the attribute that is wrong: 0 shape, 1 colour, 2 background
    shift: NDArray[np.int64]  # how far round its list a redrawn attribute moves, 1 .. 3
    grain: NDArray[np.float64]  # std of the grain beyond the floor
    blurred: NDArray[np.bool_]


def draw_looks(n: int, rng: np.random.Generator) -> Looks:
    """Random looks with defects at the world's rates."""
    return Looks(
        vividness=rng.uniform(*VIVIDNESS, n),
        radius=rng.uniform(*RADIUS, n),
        offset=rng.uniform(-OFFSET, OFFSET, (n, 2)),
        tint=rng.uniform(-TINT, TINT, (n, 3)),
        redrawn=np.where(rng.random(n) < REDRAWN_RATE, rng.integers(0, 3, n), -1),
        shift=rng.integers(1, 4, n),
        grain=np.where(rng.random(n) < GRAIN_RATE, rng.uniform(*GRAIN_EXTRA, n), 0.0),
        blurred=rng.random(n) < BLUR_RATE,
    )


def without_defects(looks: Looks) -> Looks:
    """The same looks with nothing redrawn, no extra grain and no blur."""
    n = len(looks.vividness)
    return replace(looks, redrawn=np.full(n, -1), grain=np.zeros(n), blurred=np.zeros(n, bool))


def render(combinations: Sequence[Combination], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Images [n 16 16 3] of the combinations, each with random looks, defects included."""
    return paint(combinations, draw_looks(len(combinations), rng), rng)


def paint(combinations: Sequence[Combination], looks: Looks, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Images [n 16 16 3] of the combinations with given looks; `rng` draws the texture alone."""
    shape = np.array([SHAPES.index(c.shape) for c in combinations])
    colour = np.array([COLOURS.index(c.colour) for c in combinations])
    background = np.array([BACKGROUNDS.index(c.background) for c in combinations])
    shape = np.where(looks.redrawn == 0, (shape + looks.shift) % len(SHAPES), shape)
    colour = np.where(looks.redrawn == 1, (colour + looks.shift) % len(COLOURS), colour)
    background = np.where(looks.redrawn == 2, (background + looks.shift) % len(BACKGROUNDS), background)

    vivid = np.array(list(FOREGROUND.values()))[colour]
    fore = PALE + looks.vividness[:, None] * (vivid - PALE)
    back = np.array(list(BACKGROUND.values()))[background] + looks.tint
    cover = masks(shape, looks.radius, looks.offset)[..., None]
    picture = back[:, None, None] * (1 - cover) + fore[:, None, None] * cover
    picture = np.where(looks.blurred[:, None, None, None], _blur(picture, passes=2), picture)
    return to_uint8(picture + texture(len(combinations), rng, looks.grain))


def masks(shape: NDArray[np.int64], radius: NDArray[np.float64], offset: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coverage [n 16 16] in [0, 1] of shapes given by index, radius and offset from the centre (pixels)."""
    axis = (np.arange(SIZE * SUPERSAMPLE) + 0.5) / SUPERSAMPLE - SIZE / 2
    x = (axis[None, None, :] - offset[:, 0, None, None]) / radius[:, None, None]
    y = (axis[None, :, None] - offset[:, 1, None, None]) / radius[:, None, None]
    inside = np.stack(
        [
            x**2 + y**2 <= 1,
            np.maximum(abs(x), abs(y)) <= 0.84,
            (y <= 0.72) & (abs(x) * 1.75 <= y + 1),
            (np.minimum(abs(x), abs(y)) <= 0.30) & (np.maximum(abs(x), abs(y)) <= 1),
        ]
    )
    drawn = inside[shape, np.arange(len(shape))]
    return drawn.reshape(-1, SIZE, SUPERSAMPLE, SIZE, SUPERSAMPLE).mean((2, 4))


def texture(n: int, rng: np.random.Generator, extra_grain: NDArray[np.float64] | float = 0.0) -> NDArray[np.float64]:
    """Additive texture [n 16 16 3]: the smooth field, the floor of grain, and `extra_grain` (std) on top of it."""
    smooth = _blur(rng.standard_normal((n, SIZE, SIZE, 3)), passes=SMOOTH_PASSES) * (SMOOTH_FLOOR / _BLURRED_STD)
    std = np.sqrt(GRAIN_FLOOR**2 + np.broadcast_to(extra_grain, (n,)) ** 2)
    return smooth + std[:, None, None, None] * rng.standard_normal((n, SIZE, SIZE, 3))


def to_uint8(picture: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Values in [0, 1], clipped, as bytes."""
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _blur(x: NDArray[np.float64], passes: int) -> NDArray[np.float64]:
    """The 1-2-1 kernel along height and width, `passes` times; edges wrap round (they are background)."""
    for _ in range(passes):
        for axis in (1, 2):
            x = (np.roll(x, 1, axis) + 2 * x + np.roll(x, -1, axis)) / 4
    return x


_BLURRED_STD = 12870 / 4**8  # of unit white noise after four passes: C(16, 8) / 4^8 per axis, and sqrt of its square
