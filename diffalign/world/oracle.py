"""The true reward of an image of the world, read from its pixels alone.

Every shape, radius and offset is fitted as "one colour inside, one outside" by least squares; the best fit gives the
shape, both colours, and what is left over gives the grain. No network, no randomness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.world.captions import BACKGROUNDS, COLOURS, SHAPES, Combination
from diffalign.world.render import BACKGROUND, FOREGROUND, OFFSET, PALE, RADIUS, SIZE, masks

RADII = 7  # templates per shape
OFFSETS = 7  # templates per shape and axis
CHUNK = 512  # images fitted at once: about 10 MB

# How soft the three readings are: small enough for a confident answer, large enough to be graded.
SHAPE_SOFTNESS = 0.02  # in the fitted contrast, relative to the best fit
COLOUR_SOFTNESS = 0.08  # distance in RGB
BACKGROUND_SOFTNESS = 0.08  # distance in RGB
NOISE_STD = 0.11  # of the texture, for the weight of neighbouring radii

GRAIN_AT_FLOOR = 0.1014  # grain read off clean renders (their white grain and what the smooth field adds)
GRAIN_CAP = 0.25


@dataclass(frozen=True)
class Reading:
    """What the oracle sees in n images; probabilities sum to 1 over an attribute's values."""

    shape: Tensor  # [n 4], order of captions.SHAPES
    colour: Tensor  # [n 6], order of captions.COLOURS
    background: Tensor  # [n 5], order of captions.BACKGROUNDS
    vividness: Tensor  # [n], 0 grey .. 1 the full colour
    grain: Tensor  # [n], std of the grain beyond the floor of clean renders, at least 0
    radius: Tensor  # [n], pixels


def read(pictures: Tensor) -> Reading:
    """Read images uint8 "n 16 16 3"."""
    if pictures.ndim != 4 or pictures.shape[1:] != (SIZE, SIZE, 3) or pictures.dtype != torch.uint8:
        raise DiffalignError(
            f"the oracle reads uint8 images of shape [n, {SIZE}, {SIZE}, 3]; these are {pictures.dtype} "
            f"{list(pictures.shape)}. Generate at the world's own resolution, {SIZE}"
        )
    if len(pictures) == 0:
        raise DiffalignError("the oracle was given no images; score at least one")
    parts = [_read(part.to(torch.float32) / 255) for part in pictures.split(CHUNK)]
    return Reading(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Reading)})


def faithfulness(reading: Reading, wanted: Sequence[Combination]) -> Tensor:
    """Soft faithfulness [n] in [0, 1]: probability that shape, colour and background are all as captioned."""
    columns = _columns(wanted)
    rows = torch.arange(len(wanted))
    return (
        reading.shape[rows, columns[:, 0]]
        * reading.colour[rows, columns[:, 1]]
        * reading.background[rows, columns[:, 2]]
    )


def accuracy(reading: Reading, wanted: Sequence[Combination]) -> Tensor:
    """1 where the likeliest shape, colour and background are all as captioned, else 0; [n] float32."""
    seen = torch.stack([x.argmax(1) for x in (reading.shape, reading.colour, reading.background)], dim=1)
    return (seen == _columns(wanted)).all(1).float()


def reward(reading: Reading, wanted: Sequence[Combination]) -> Tensor:
    """The reward the pairs are labelled by, [n]: R = F + V - 4 min(G, 0.25)."""
    return faithfulness(reading, wanted) + reading.vividness - 4 * reading.grain.clamp(max=GRAIN_CAP)


def size_reward(reading: Reading, wanted: Sequence[Combination]) -> Tensor:
    """Another taste, [n]: faithfulness plus size (0 at the smallest radius of the renders, 1 at the largest).

    Nothing in this package is tuned on it: it is kept for comparing methods on a reward they were not chosen for.
    """
    return faithfulness(reading, wanted) + size(reading)


def size(reading: Reading) -> Tensor:
    """Relative size [n] in [0, 1] of what is seen: 0 at the smallest radius of the renders, 1 at the largest."""
    low, high = RADIUS
    return ((reading.radius - low) / (high - low)).clamp(0, 1)


def taste_reward(reading: Reading, wanted: Sequence[Combination], taste: Tensor) -> Tensor:
    """What a user of this taste [n] prefers by, [n]: F + taste (V + S - 1) - 4 min(G, 0.25), S the relative size.

    1 likes the large and vivid, -1 the small and muted, 0 does not mind; all want the caption, and no grain.
    """
    liked = taste * (reading.vividness + size(reading) - 1)
    return faithfulness(reading, wanted) + liked - 4 * reading.grain.clamp(max=GRAIN_CAP)


def _columns(wanted: Sequence[Combination]) -> Tensor:
    return torch.tensor(
        [(SHAPES.index(w.shape), COLOURS.index(w.colour), BACKGROUNDS.index(w.background)) for w in wanted]
    )


@cache
def _templates() -> tuple[Tensor, Tensor]:
    """Masks [shape radius offset 256] and the radii."""
    radii = np.linspace(*RADIUS, RADII)
    axis = np.linspace(-OFFSET, OFFSET, OFFSETS)
    corners = np.meshgrid(np.arange(len(SHAPES)), radii, axis, axis, indexing="ij")
    grid = np.array(corners, dtype=np.float64).reshape(4, -1)
    drawn = masks(grid[0].astype(np.int64), grid[1], grid[2:].T)
    bank = torch.from_numpy(drawn).float().view(len(SHAPES), RADII, OFFSETS**2, SIZE * SIZE)
    return bank, torch.from_numpy(radii).float()


def _read(picture: Tensor) -> Reading:
    bank, radii = _templates()
    n, pixels = len(picture), picture.flatten(1, 2)  # n 256 3
    centred = bank - bank.mean(-1, keepdim=True)
    unit = centred / centred.norm(dim=-1, keepdim=True)
    # Sum of squares explained by a template with free inside and outside colours: n shape radius offset
    explained = torch.einsum("srop,npc->nsroc", unit, pixels).square_().sum(-1)
    by_shape = explained.flatten(2).amax(2)
    contrast = by_shape.sqrt()
    shape = torch.softmax(contrast / (contrast.amax(1, keepdim=True) + 1e-6) / SHAPE_SOFTNESS, dim=1)

    rows, best = torch.arange(n), by_shape.argmax(1)
    of_best = explained[rows, best]  # n radius offset
    weight = torch.softmax(of_best.amax(2) / (2 * NOISE_STD**2), dim=1)
    where = of_best.flatten(1).argmax(1)
    mask = bank.flatten(1, 2)[best, where]  # n 256
    inside, outside = _colours(mask, pixels)

    background = _probabilities(torch.cdist(outside, _table(BACKGROUND)), BACKGROUND_SOFTNESS)
    rays = _table(FOREGROUND) - PALE
    along = ((inside - PALE) @ rays.T / rays.square().sum(1)).clamp(0, 1)  # vividness if it were that colour
    off_ray = (inside[:, None] - PALE - along[..., None] * rays).norm(dim=2)
    colour = _probabilities(off_ray, COLOUR_SOFTNESS)
    return Reading(
        shape=shape,
        colour=colour,
        background=background,
        vividness=along[rows, colour.argmax(1)],
        grain=(_grain(mask, pixels) - GRAIN_AT_FLOOR).clamp(min=0),
        radius=weight @ radii,
    )


def _colours(mask: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares colours "n 3" inside and outside the mask."""
    deviation = mask - mask.mean(1, keepdim=True)
    slope = torch.einsum("np,npc->nc", deviation, pixels) / deviation.square().sum(1, keepdim=True)
    outside = pixels.mean(1) - slope * mask.mean(1, keepdim=True)
    return outside + slope, outside


def _grain(mask: Tensor, pixels: Tensor) -> Tensor:
    """Std [n] of white grain outside the shape, from the mean difference of neighbouring pixels."""
    grid = pixels.unflatten(1, (SIZE, SIZE))
    clear = (mask < 0.02).unflatten(1, (SIZE, SIZE))
    total, count = torch.zeros(len(mask)), torch.zeros(len(mask))
    for axis in (1, 2):
        both = clear.narrow(axis, 1, SIZE - 1) & clear.narrow(axis, 0, SIZE - 1)
        total += (grid.diff(dim=axis).abs().mean(3) * both).sum((1, 2))
        count += both.sum((1, 2))
    return total / count * (np.pi**0.5 / 2)  # E|a - b| = 2 std / sqrt(pi)


def _table(colours: dict[str, tuple[float, float, float]]) -> Tensor:
    return torch.tensor(list(colours.values()))


def _probabilities(distance: Tensor, softness: float) -> Tensor:
    return torch.softmax(-0.5 * (distance / softness).square(), dim=1)
