"""The true reward of an image of the emoji world, read from its pixels.

The judge names thing and style; everything else is a rule. With the background's colour B, the median of the image's
rim, and the drawing, all pixels that differ from B:

    R = F + (V + S) / 2 - 4 min(U, 0.25)

F, faithfulness, is the probability that thing, background and (where the caption names one) style are the caption's.
V, vividness, is the drawing's mean chroma, relative to that of the art: 0 grey, 1 the art's own colours. Each of eight
hues counts for no more than the art has of it, so that hues which the art lacks and oversaturation earn nothing.
S, sharpness, is the ratio of second to first differences, which blur lowers at any contrast: 0 blurred, 1 sharp.
U, unevenness, is the spread of the rim around B: clean renders have 0.

A taste adds twice the probability of one style: three tastes, three styles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.world.emoji.art import drawings
from diffalign.world.emoji.captions import BACKGROUNDS, STYLES, THINGS, Combination
from diffalign.world.emoji.judge import judge
from diffalign.world.emoji.render import EXTENT, SIZE, background_table

RIM = 3  # pixels
BACKGROUND_SOFTNESS = 0.06  # distance in RGB
CONTRAST = 0.10  # distance in RGB from which on a pixel belongs to the drawing
HUES = 8  # parts of the circle of hues
LEAST_CHROMA = 0.12  # of the art: nearly grey drawings are compared with this
SHARPNESS = (0.45, 0.95)  # ratio of differences: of the most blurred renders, and of sharp ones
UNEVENNESS_CAP = 0.25
TASTE = 2.0  # weight of the probability of the style that is liked
BATCH = 256  # images read at once


@dataclass(frozen=True)
class Reading:
    """What n images show; probabilities sum to 1 over an attribute's values."""

    thing: Tensor  # [n 25], order of captions.THINGS, then "nothing"
    style: Tensor  # [n 3], order of captions.STYLES
    background: Tensor  # [n 8], order of captions.BACKGROUNDS
    vividness: Tensor  # [n] in [0, 1]
    sharpness: Tensor  # [n] in [0, 1]
    unevenness: Tensor  # [n], std of the background in [0, 1] colours
    size: Tensor  # [n] in [0, 1]: 0 the smallest drawing of the renders, 1 the largest


def read(images: Tensor) -> Reading:
    """Reads images uint8 "n 64 64 3". Raises DiffalignError for other shapes or types, and for none at all."""
    if images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3) or images.dtype != torch.uint8:
        raise DiffalignError(
            f"the emoji world's reward reads uint8 images of shape [n, {SIZE}, {SIZE}, 3]; these are {images.dtype} "
            f"{list(images.shape)}. Generate at this world's own resolution, {SIZE}"
        )
    if len(images) == 0:
        raise DiffalignError("the emoji world's reward was given no images; score at least one")
    parts = [_read(part.float() / 255) for part in images.split(BATCH)]
    return Reading(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Reading)})


def faithfulness(reading: Reading, wanted: Sequence[Combination]) -> Tensor:
    """F [n] in [0, 1]: the probability that everything that the caption names is as it says."""
    rows = torch.arange(len(wanted))
    style = torch.cat([reading.style, torch.ones(len(wanted), 1)], dim=1)  # the last: no style is asked for
    asked = _columns(wanted)
    return reading.thing[rows, asked[:, 0]] * reading.background[rows, asked[:, 1]] * style[rows, asked[:, 2]]


def accuracy(reading: Reading, wanted: Sequence[Combination]) -> Tensor:
    """1 where the likeliest thing, background and (where named) style are as captioned, else 0; [n] float32."""
    asked = _columns(wanted)
    style = (reading.style.argmax(1) == asked[:, 2]) | (asked[:, 2] == len(STYLES))
    seen = torch.stack([reading.thing.argmax(1), reading.background.argmax(1)], dim=1)
    return ((seen == asked[:, :2]).all(1) & style).float()


def reward(reading: Reading, wanted: Sequence[Combination]) -> Tensor:
    """R [n]: F + (V + S) / 2 - 4 min(U, 0.25)."""
    graded = (reading.vividness + reading.sharpness) / 2
    return faithfulness(reading, wanted) + graded - 4 * reading.unevenness.clamp(max=UNEVENNESS_CAP)


def taste_reward(reading: Reading, wanted: Sequence[Combination], style: str) -> Tensor:
    """R plus twice the probability of a style, [n]: what somebody with a taste for this style prefers by."""
    return reward(reading, wanted) + TASTE * reading.style[:, STYLES.index(style)]


def size_reward(reading: Reading, wanted: Sequence[Combination]) -> Tensor:
    """Faithfulness plus size, [n] in [0, 2]: a second reward, on which nothing in this package is tuned."""
    return faithfulness(reading, wanted) + reading.size


def _columns(wanted: Sequence[Combination]) -> Tensor:
    """Indices "n 3" of thing, background and style; the style is 3 where none is named."""
    return torch.tensor(
        [
            (THINGS.index(c.thing), BACKGROUNDS.index(c.background), STYLES.index(c.style) if c.style else len(STYLES))
            for c in wanted
        ]
    )


@torch.no_grad()
def _read(pixels: Tensor) -> Reading:
    """Reads pixels "n 64 64 3" in [0, 1]."""
    planes = pixels.permute(0, 3, 1, 2)
    things, styles = judge()(planes * 2 - 1)
    thing, style = things.softmax(1), styles.softmax(1)
    rim = pixels[:, _rim_mask()]  # n pixels 3
    back = rim.median(dim=1).values
    distance = torch.cdist(back, torch.from_numpy(background_table()))
    drawing = (pixels - back[:, None, None]).norm(dim=3) > CONTRAST
    art = torch.einsum("nt,ns,tsk->nk", thing[:, :-1], style, _chroma_of_art())
    art = art / thing[:, :-1].sum(1, keepdim=True).clamp(min=1e-6)
    shown = torch.minimum(_mean(_chroma(planes), drawing[:, None]), art)
    return Reading(
        thing=thing,
        style=style,
        background=torch.softmax(-0.5 * (distance / BACKGROUND_SOFTNESS).square(), dim=1),
        vividness=shown.sum(1) / art.sum(1).clamp(min=LEAST_CHROMA),
        sharpness=_sharpness(planes, drawing),
        unevenness=1.4826 * (rim - back[:, None]).abs().median(dim=1).values.mean(1),
        size=_size(drawing),
    )


def _chroma(planes: Tensor) -> Tensor:
    """Chroma "n hue h w" of planes "n 3 h w", divided between the two hues nearest to a pixel's own.

    A render's vividness scales it linearly and leaves the hue.
    """
    red, green, blue = planes.unbind(1)
    across, along = red - (green + blue) / 2, (green - blue) * 3**0.5 / 2
    hue = torch.atan2(along, across) / (2 * torch.pi) * HUES
    centre = torch.arange(HUES)[:, None, None]
    distance = ((hue[:, None] - centre + HUES / 2) % HUES - HUES / 2).abs()
    return torch.hypot(across, along)[:, None] * (1 - distance).clamp(min=0)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean "n k" of values "n k h w" where the mask "n 1 h w" is set; 0 where it is empty."""
    return (values * mask).sum((2, 3)) / mask.sum((2, 3)).clamp(min=1)


def _sharpness(planes: Tensor, drawing: Tensor) -> Tensor:
    """S [n] in [0, 1]: rms of second differences over rms of first differences, on the usual scale of the renders."""
    first = sum(planes.diff(dim=axis).square().sum((1, 2, 3)) for axis in (2, 3))
    second = sum(planes.diff(n=2, dim=axis).square().sum((1, 2, 3)) for axis in (2, 3))
    ratio = (torch.as_tensor(second) / torch.as_tensor(first).clamp(min=1e-6)).sqrt()
    low, high = SHARPNESS
    return ((ratio - low) / (high - low)).clamp(0, 1) * drawing.any(2).any(1)


def _size(drawing: Tensor) -> Tensor:
    """Relative size [n] of masks "n 64 64": the longer side of what they cover, rows and columns of one pixel aside."""
    height = (drawing.sum(2) > 1).sum(1)
    width = (drawing.sum(1) > 1).sum(1)
    low, high = EXTENT
    return ((torch.maximum(height, width) - low) / (high - low)).clamp(0, 1)


@cache
def _rim_mask() -> Tensor:
    """Mask "64 64" of the outermost pixels."""
    mask = torch.ones(SIZE, SIZE, dtype=torch.bool)
    mask[RIM:-RIM, RIM:-RIM] = False
    return mask


@cache
def _chroma_of_art() -> Tensor:
    """Mean chroma "24 3 hue" of each drawing at full vividness."""
    table = torch.zeros(len(THINGS), len(STYLES), HUES)
    for t, row in enumerate(drawings()):
        for s, drawing in enumerate(row):
            bands = np.stack([np.asarray(band, dtype=np.float32) / 255 for band in drawing.split()])
            layer = torch.from_numpy(bands)[None]
            table[t, s] = _mean(_chroma(layer[:, :3]), layer[:, 3:] > 0.5)[0]
    return table
