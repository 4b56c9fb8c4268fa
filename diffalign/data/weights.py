"""The terms of a pair, which a row may have besides its images: a weight, a margin, and a mask over the image.

    weight   a number ≥ 0 that the pair's loss is multiplied by; empty: 1
    margin   a number subtracted from the logit; empty: 0
    mask     rows of numbers in [−1, 1], a grid of any size laid over the whole image; empty: 1 everywhere

A mask is relative to the chosen image: 1 counts as labelled, 0 not at all, −1 with the sides swapped. Grids and
not mask images, because 8 bits have no agreed zero for numbers with a sign: a black region would have to mean −1.

A further term that is a number for each pair is an entry of `TERMS` here and a field of `types.Terms` of that name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.data.formats.text_files import parse_json
from diffalign.data.row import BAD_TERM, ImageError, ImageRef
from diffalign.data.transforms import resized
from diffalign.types import Terms


@dataclass(frozen=True)
class Number:
    """A term that is one number for each pair."""

    neutral: float  # the value of an empty cell
    least: float = -math.inf

    def read(self, cell: Any, part: str, where: str) -> float:
        """The value of a cell. Raises ImageError (bad weight, margin or mask)."""
        if cell is None or cell == "":
            return self.neutral
        try:
            value = float(cell)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value) or value < self.least:
            allowed = "a finite number" + (f", {self.least:g} or more" if math.isfinite(self.least) else "")
            raise ImageError(BAD_TERM, f"{where}: {part} is {cell!r}; write {allowed}, or leave it empty")
        return value


# The terms by the name of their column, which is that of their field in `types.Terms`; None: a grid, see `read_mask`.
TERMS: dict[str, Number | None] = {
    "weight": Number(neutral=1.0, least=0.0),
    "margin": Number(neutral=0.0),
    "mask": None,
}


def terms_of(numbers: Mapping[str, float], mask: Tensor | None) -> Terms:
    """The terms of one pair as a batch of one: its numbers by name, and its mask on the latents "h w"."""
    tensors = {part: torch.tensor([value], dtype=torch.float32) for part, value in numbers.items()}
    return Terms(**tensors, mask=None if mask is None else mask[None])


def read_mask(cell: Any, where: str) -> Tensor:
    """A mask's grid, float64 [H W]. Raises ImageError (bad weight, margin or mask).

    cell: nested lists or arrays of numbers, or JSON of them as text, bytes or a file inside a tar shard.
    """
    if isinstance(cell, ImageRef):
        cell = cell.read()
    if cell is None or (isinstance(cell, str | bytes) and not cell.strip()):
        return torch.ones(1, 1, dtype=torch.float64)
    try:
        rows = parse_json(cell) if isinstance(cell, str | bytes) else cell
        if isinstance(rows, dict) or any(isinstance(row, str | bytes | dict) for row in rows):
            raise TypeError("its rows are not lists")
        grid = torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise _bad_mask(where, f"is not a grid of numbers ({error})") from error
    if grid.ndim != 2 or not grid.numel():
        raise _bad_mask(where, f"has the shape {tuple(grid.shape)}")
    if not bool((grid.abs() <= 1).all()):
        raise _bad_mask(where, f"has values from {float(grid.min()):g} to {float(grid.max()):g}")
    return grid


def _bad_mask(where: str, what: str) -> ImageError:
    return ImageError(BAD_TERM, f"{where}: mask {what}; write rows of numbers in [-1, 1], all of the same length")


def on_latents(grid: Tensor, geometry: Tensor, *, flip: bool, factor: int, where: str) -> Tensor:
    """A grid cropped and flipped as its pair was, averaged by area over each place of the latents: float32 [h w].

    geometry: int64 "side 6" of all images, see `transforms.prepare_pair`. factor: pixels for a place of the latents.
    Raises ImageError where the images are not of one shape, so that no grid fits all.
    """
    height, width, top, left, own_h, own_w = geometry[0].tolist()
    new_w, new_h = resized((width, height), (own_w, own_h))
    for h, w in geometry[1:, :2].tolist():
        other = resized((w, h), (own_w, own_h))
        if max(abs(new_w - other[0]), abs(new_h - other[1])) > factor:  # more than one place of the latents
            shapes = f"{width}x{height} and {w}x{h} pixels"
            raise ImageError(BAD_TERM, f"{where}: a mask needs images of the same shape, and these have {shapes}")
    if flip:
        grid = grid.flip(-1)  # geometry's left is that of the mirrored image
    rows = shares(top / new_h, own_h / new_h, grid.shape[0], own_h // factor)
    columns = shares(left / new_w, own_w / new_w, grid.shape[1], own_w // factor)
    return (rows @ grid @ columns.T).float().clamp(-1, 1)


def shares(start: float, length: float, cells: int, parts: int) -> Tensor:
    """The share of each of `cells` equal cells of [0, 1] in each of `parts` equal pieces of [start, start + length].

    Float64 [parts cells]; rows sum to 1.
    """
    edges = (start + length * torch.arange(parts + 1, dtype=torch.float64) / parts) * cells
    cell = torch.arange(cells, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], cell)
    high = torch.minimum(edges[1:, None], cell + 1)
    overlap = (high - low).clamp(min=0)
    return overlap / overlap.sum(1, keepdim=True)
