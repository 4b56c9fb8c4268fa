"""From two encoded images to two pixel tensors of one size, and SDXL's geometry of both; and pixels to images.

One crop and one flip are drawn per visit of a pair and used for both sides, so that the sides differ in
content only. Left out: aspect-ratio buckets; every pair becomes a square.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data.row import ImageRef, PairRow, check_size
from diffalign.engine.random import uniform
from diffalign.errors import DiffalignError

EXTREME = 4  # times as long as wide: above it, only the crop is resized, and `diffalign data check` reports it


def prepare_pair(
    row: PairRow, resolution: int, *, key: int, center_crop: bool, random_flip: bool
) -> tuple[Tensor, Tensor]:
    """Pixels float32 [2 3 h w] in [-1, 1] and geometry int64 [2 6] of both sides.

    The shorter side is resized to `resolution` (Lanczos, antialiased) and a square is cropped at the same
    relative position of both sides. geometry = (original_h, original_w, crop_top, crop_left, target_h,
    target_w) in pixels, original before and crop after resizing, as SDXL's micro-conditioning has it; with a
    flip, crop_left is the one in the mirrored image. `key` (from `pair_key`) decides crop and flip.
    Raises ImageError when a side does not decode or is smaller than MIN_SIDE.
    """
    refs = (row.chosen, row.rejected)
    return prepare_images(refs, resolution, key=key, center_crop=center_crop, random_flip=random_flip)


def prepare_images(
    refs: Sequence[ImageRef], resolution: int, *, key: int, center_crop: bool, random_flip: bool
) -> tuple[Tensor, Tensor]:
    """Pixels float32 "image 3 h w" and geometry int64 "image 6" of images that are cropped and flipped alike.

    See `prepare_pair`.
    """
    position = 0.5 if center_crop else float(uniform(torch.tensor([key], dtype=torch.int64), "crop"))
    flip = random_flip and flips(key)
    found = [prepare(_opened(ref), resolution, position, flip) for ref in refs]
    return torch.stack([pixels for pixels, _ in found]), torch.tensor([box for _, box in found])


def flips(key: int) -> bool:
    """Whether the pair is mirrored at this visit, where `random_flip` is on."""
    return float(uniform(torch.tensor([key], dtype=torch.int64), "flip")) < 0.5


def resized(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """(width, height) once the shorter side has been brought to `resolution`."""
    scale = resolution / min(size)
    width, height = (max(resolution, round(length * scale)) for length in size)
    return width, height


def _opened(ref: ImageRef) -> Image.Image:
    image = ref.open()
    check_size(image.size, ref.where)
    return image


def prepare(
    image: Image.Image, resolution: int, position: float, flip: bool
) -> tuple[Tensor, tuple[int, int, int, int, int, int]]:
    """One side: pixels float32 [3 h w] and its geometry. `position` in [0, 1] along the longer axis."""
    width, height = image.size
    new_w, new_h = resized(image.size, resolution)
    top, left = round((new_h - resolution) * position), round((new_w - resolution) * position)
    if max(image.size) > EXTREME * min(image.size):  # the same pixels to a rounding, without the rest of the long side
        x, y = width / new_w, height / new_h
        box = (left * x, top * y, min((left + resolution) * x, width), min((top + resolution) * y, height))
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    else:
        if (new_w, new_h) != image.size:
            image = image.resize((new_w, new_h), Image.Resampling.LANCZOS)
        image = image.crop((left, top, left + resolution, top + resolution))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left = new_w - resolution - left
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)
    return pixels.contiguous(), (height, width, top, left, resolution, resolution)


def to_images(pixels: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """8-bit images of decoded pixels "n 3 h w" in [0, 1]; one transfer.

    Raises DiffalignError naming prompt and seed of the first image that is not finite.
    """
    broken = (~pixels.isfinite().flatten(1).all(1)).nonzero()
    if len(broken):
        i = int(broken[0])
        raise DiffalignError(
            f"the image of prompt {prompts[i]!r}, seed {seeds[i]} is NaN; half precision overflows in "
            "some VAEs: use dtype float32 or bfloat16, or an fp16-safe VAE"
        )
    array = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(image) for image in array]
