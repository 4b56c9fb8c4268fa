"""From two encoded images to two pixel tensors of one size, and SDXL's geometry of both; and pixels to images.

One crop and one flip are drawn per visit of a pair and used for both sides, so that the sides differ in
content only. They come to a square, or to the size of their aspect bucket (`data/buckets`).
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

Size = tuple[int, int]  # width and height in pixels

EXTREME = 4  # times as long as wide: above it, only the crop is resized, and `diffalign data check` reports it


def prepare_pair(row: PairRow, size: Size, *, key: int, center_crop: bool, random_flip: bool) -> tuple[Tensor, Tensor]:
    """Pixels float32 "side 3 h w" in [-1, 1] and geometry int64 "side 6" of all sides of a pair or a ranked list.

    Each is resized until it covers `size` (Lanczos, antialiased), and what is too much of one of its lengths is cropped
    at the same relative position of all sides. geometry = (original_h, original_w, crop_top, crop_left, target_h,
    target_w) in pixels, original before and crop after resizing, as SDXL's micro-conditioning has it; with a
    flip, crop_left is the one in the mirrored image. `key` (from `pair_key`) decides crop and flip.
    Raises ImageError when a side does not decode or is smaller than MIN_SIDE.
    """
    return prepare_images(row.images, size, key=key, center_crop=center_crop, random_flip=random_flip)


def prepare_images(
    refs: Sequence[ImageRef], size: Size, *, key: int, center_crop: bool, random_flip: bool
) -> tuple[Tensor, Tensor]:
    """Pixels float32 "image 3 h w" and geometry int64 "image 6" of images that are cropped and flipped alike.

    See `prepare_pair`.
    """
    position = 0.5 if center_crop else float(uniform(torch.tensor([key], dtype=torch.int64), "crop"))
    flip = random_flip and flips(key)
    found = [prepare(_opened(ref), size, position, flip) for ref in refs]
    return torch.stack([pixels for pixels, _ in found]), torch.tensor([box for _, box in found])


def flips(key: int) -> bool:
    """Whether the pair is mirrored at this visit, where `random_flip` is on."""
    return float(uniform(torch.tensor([key], dtype=torch.int64), "flip")) < 0.5


def resized(image: Size, size: Size) -> Size:
    """(width, height) of an image once it just covers `size`."""
    scale = max(size[0] / image[0], size[1] / image[1])
    width, height = (max(least, round(length * scale)) for length, least in zip(image, size, strict=True))
    return width, height


def _opened(ref: ImageRef) -> Image.Image:
    image = ref.open()
    check_size(image.size, ref.where)
    return image


def prepare(
    image: Image.Image, size: Size, position: float, flip: bool
) -> tuple[Tensor, tuple[int, int, int, int, int, int]]:
    """One side: pixels float32 [3 h w] and its geometry. `position` in [0, 1] along the axis that is cropped."""
    (width, height), (own_w, own_h) = image.size, size
    new_w, new_h = resized(image.size, size)
    top, left = round((new_h - own_h) * position), round((new_w - own_w) * position)
    one, two = width * own_h, height * own_w
    if max(one, two) > EXTREME * min(one, two):  # the same pixels to a rounding, without the rest of the long side
        x, y = width / new_w, height / new_h
        box = (left * x, top * y, min((left + own_w) * x, width), min((top + own_h) * y, height))
        image = image.resize(size, Image.Resampling.LANCZOS, box=box)
    else:
        if (new_w, new_h) != image.size:
            image = image.resize((new_w, new_h), Image.Resampling.LANCZOS)
        image = image.crop((left, top, left + own_w, top + own_h))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left = new_w - own_w - left
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)
    return pixels.contiguous(), (height, width, top, left, own_h, own_w)


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
