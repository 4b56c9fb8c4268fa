"""Images to CLIP pixels, with PIL and torch only.

`crop` is the published CLIP preparation (shortest side to `size`, bicubic, centre crop); `centre_crop` is the same by
torchvision; `pad` is HPSv2's (longest side to `size`, bicubic, black bars). All resize through PIL, whose filter is
anti-aliased.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Mean and standard deviation per RGB channel of the pixels CLIP was trained on (in [0, 1]).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Fit = Callable[[Image.Image, int], Image.Image]


def crop(image: Image.Image, size: int) -> Image.Image:
    """Shortest side resized to `size`, then the centre `size` × `size`."""
    width, height = image.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """`crop` as torchvision has it: where the centre is half a pixel off, half to even is the side that is cut."""
    width, height = image.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def pad(image: Image.Image, size: int) -> Image.Image:
    """Longest side resized to `size`, the rest filled with black on both sides."""
    scale = size / max(image.size)
    width, height = (round(side * scale) for side in image.size)
    canvas = Image.new("RGB", (size, size))
    resized = image.resize((width, height), Image.Resampling.BICUBIC) if scale != 1 else image
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
    return canvas


def clip_pixels(images: Sequence[Image.Image], size: int, fit: Fit) -> Tensor:
    """Normalised float32 pixels "n 3 size size"; black bars of `pad` become normalised black, as published."""
    fitted = [np.asarray(fit(image.convert("RGB"), size)) for image in images]
    pixels = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
