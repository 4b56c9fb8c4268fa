"""Aspect buckets: pairs come to one of several sizes of about the same area, in place of squares.

Both sides of a pair come to one size, because they are compared place by place. It is the one in which both together
lose the least to cropping, so swapped sides have the same bucket; of equals the largest, then the first of the table.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from diffalign.data.row import DataError
from diffalign.data.table.pairs import PairTable
from diffalign.data.transforms import Size

# The sizes that SDXL was trained on (arXiv 2307.01952, appendix I): (width, height).
SDXL: tuple[Size, ...] = (
    *((512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600)),
    *((640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152)),
    *((896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896)),
    *((1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640)),
    *((1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512)),
)


def sdxl_sizes(resolution: int) -> tuple[Size, ...]:
    """SDXL's table, scaled from 1024 pixels to `resolution`. Raises DataError where a side is no whole number."""
    if resolution % 128:
        raise DataError(
            f"data.aspect_buckets.table: sdxl at {resolution} pixels: its sides are 1/16 of the resolution and must be "
            "multiples of 8; set data.resolution to a multiple of 128, or table: kohya"
        )
    return tuple((width * resolution // 1024, height * resolution // 1024) for width, height in SDXL)


def kohya_sizes(resolution: int, step: int, least: int, most: int) -> tuple[Size, ...]:
    """The square, and for each side from `least` to `most` in steps the longest other one within the square's area.

    As sd-scripts makes its buckets. Raises DataError where there is none.
    """
    square = resolution // step * step
    found = {(square, square)} if square else set()
    for side in range(least, most + 1, step):
        other = min(most, resolution**2 // side // step * step)
        if other >= least:
            found |= {(side, other), (other, side)}
    if not found or least % step:
        raise DataError(
            f"data.aspect_buckets: no sizes from {least} to {most} in steps of {step} at {resolution} pixels: min_side "
            "must be a multiple of step, and step at most the resolution"
        )
    return tuple(sorted(found))


def lost(image: Size, size: Size) -> float:
    """The share of an image's pixels that are cropped when it covers a size."""
    one, two = image[0] * size[1], image[1] * size[0]
    return 1 - min(one, two) / max(one, two)


def bucket_of(chosen: Size, rejected: Size, sizes: Sequence[Size]) -> int:
    """The index of the size that a pair comes to."""
    return min(
        range(len(sizes)),
        key=lambda i: (round(lost(chosen, sizes[i]) + lost(rejected, sizes[i]), 12), -sizes[i][0] * sizes[i][1], i),
    )


@dataclass(frozen=True)
class Shapes:
    """The size (width, height) in pixels that the images of each pair come to."""

    name: str  # of the table with its settings, for the key of a cache
    sizes: tuple[Size, ...]
    bucket: array[int] | None = None  # of each pair, an index into `sizes`; None: all pairs are in the first

    def __getitem__(self, index: int) -> Size:
        return self.sizes[0 if self.bucket is None else self.bucket[index]]

    @cached_property
    def groups(self) -> list[list[int]]:
        """The pairs of each bucket that has any, in stored order. Empty without buckets."""
        groups: dict[int, list[int]] = {}
        for index, bucket in enumerate(self.bucket or ()):
            groups.setdefault(bucket, []).append(index)
        return [groups[bucket] for bucket in sorted(groups)]

    def peers(self, index: int, pairs: int) -> Sequence[int]:
        """The pairs, of so many, that come to the size of this one."""
        if self.bucket is None:
            return range(pairs)
        return next(group for group in self.groups if self.bucket[group[0]] == self.bucket[index])

    @property
    def counts(self) -> list[tuple[Size, int]]:
        """The sizes that pairs come to, and how many, from the narrowest to the widest."""
        found = Counter(self.bucket or ())
        return sorted(((self.sizes[b], n) for b, n in found.items()), key=lambda each: each[0][0] / each[0][1])


def square(resolution: int) -> Shapes:
    """Every pair as a square."""
    return Shapes("", ((resolution, resolution),))


def in_buckets(table: PairTable, name: str, sizes: tuple[Size, ...]) -> Shapes:
    """Every pair in its bucket. Raises DataError where the sizes of the images are not known."""
    images = table.sizes
    if len(images) != 2 * len(table):
        raise DataError(
            "data.aspect_buckets needs the sizes of the images, which verify='none' does not read; remove it"
        )
    known: dict[tuple[Size, Size], int] = {}
    bucket = array("i")
    for pair in zip(images[::2], images[1::2]):
        if pair not in known:
            known[pair] = bucket_of(*pair, sizes)
        bucket.append(known[pair])
    return Shapes(name, sizes, bucket)


def cropped(table: PairTable, shapes: Shapes) -> float:
    """The mean share of the images' pixels that is cropped."""
    images = table.sizes
    return sum(lost(image, shapes[i // 2]) for i, image in enumerate(images)) / max(1, len(images))
