"""GroupNorm, and SiLU after it, on NHWC activations: six Triton kernels, three forward and three backward.

    z = (x - mean) · rstd          mean and rstd over a group's channels and all places of one image
    y = γ z + β,   out = y σ(y)

Channels are neighbours in memory, and a group has 10 to 80 of them in SDXL: no power of two, and too few to read by
itself. So a program takes a tile of places and 64 channels, whatever their groups; what goes over places is summed per
channel within the tile, tiles are put together per group by a second kernel, and a third goes over the tensor again.

Deterministic: no atomics, and an image's sums in one order, which depends on its size alone and not on the batch. Sums,
statistics and SiLU are float32 whatever the tensors are. Variances are of differences from the tile's own mean, put
together as in Chan et al. (1979): a large mean cancels nothing.

Imports triton; `fused_norm.py` imports this module when a kernel is launched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 64  # of a tile: 128 bytes of bfloat16, and a divisor of all of SDXL's channels
FORWARD_VALUES, BACKWARD_VALUES = 32, 16  # of a tensor in a thread's registers; the backward has two tensors there
GROUP_VALUES, GROUP_WARPS = 1024, 4  # of tiles and channels that a group's kernel puts together at once


@triton.jit
def _places(places, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(offsets, which exist, channels, which exist, first place's offset) of this program's tile."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < places)[:, None] & (channel < channels)[None, :]
    offsets = row[:, None] * channels + channel[None, :]
    return offsets, inside, channel, channel < channels, tl.program_id(2).to(tl.int64) * places * channels


@triton.jit
def moments(x, partial, places, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean, and sum of squared differences from it, of each channel over a tile's places."""
    offsets, inside, channel, exists, image = _places(places, channels, ROWS, BLOCK)
    values = tl.load(x + image + offsets, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(places - tl.program_id(0) * ROWS, ROWS).to(tl.float32)
    mean = tl.sum(values, 0) / count
    apart = tl.where(inside, values - mean[None, :], 0.0)
    tile = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * 2 * channels
    tl.store(partial + tile + channel, mean, mask=exists)
    tl.store(partial + tile + channels + channel, tl.sum(apart * apart, 0), mask=exists)


@triton.jit
def statistics(
    partial, mean, rstd, places, channels, width, eps,
    COUNT: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of one group of one image, from its tiles' moments."""
    group, image = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, WIDTH)
    total = tl.zeros((TILES, WIDTH), tl.float32)
    for start in range(0, COUNT, TILES):
        tile = start + tl.arange(0, TILES)
        here = (tile < COUNT)[:, None] & (lane < width)[None, :]
        at = partial + ((image * COUNT + tile) * 2 * channels)[:, None] + (group * width + lane)[None, :]
        count = tl.minimum(places - tile * ROWS, ROWS).to(tl.float32)
        total += tl.load(at, mask=here, other=0.0) * count[:, None]
    size = places * 1.0 * width
    centre = tl.sum(tl.sum(total, 1), 0) / size
    spread = tl.zeros((TILES, WIDTH), tl.float32)
    for start in range(0, COUNT, TILES):
        tile = start + tl.arange(0, TILES)
        here = (tile < COUNT)[:, None] & (lane < width)[None, :]
        at = partial + ((image * COUNT + tile) * 2 * channels)[:, None] + (group * width + lane)[None, :]
        count = tl.minimum(places - tile * ROWS, ROWS).to(tl.float32)
        apart = tl.load(at, mask=here, other=0.0) - centre
        within = tl.load(at + channels, mask=here, other=0.0)
        spread += tl.where(here, within + count[:, None] * apart * apart, 0.0)
    variance = tl.sum(tl.sum(spread, 1), 0) / size
    out = image * tl.num_programs(0) + group
    tl.store(mean + out, centre)
    tl.store(rstd + out, 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit
def _group(mean, rstd, weight, bias, channel, exists, width, groups):
    """Statistics and affine parameters of a tile's channels."""
    at = tl.program_id(2) * groups + channel // width
    centre, scale = tl.load(mean + at, mask=exists, other=0.0), tl.load(rstd + at, mask=exists, other=0.0)
    gamma = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    return centre, scale, gamma, tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def apply(
    x,
    mean,
    rstd,
    weight,
    bias,
    out,
    places,
    channels,
    width,
    groups,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The answer, from the statistics."""
    offsets, inside, channel, exists, image = _places(places, channels, ROWS, BLOCK)
    centre, scale, gamma, beta = _group(mean, rstd, weight, bias, channel, exists, width, groups)
    values = tl.load(x + image + offsets, mask=inside, other=0.0).to(tl.float32)
    y = (values - centre[None, :]) * scale[None, :] * gamma[None, :] + beta[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + image + offsets, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _slope(values, grad, centre, scale, gamma, beta, SILU: tl.constexpr):
    """(z, dL/dy): SiLU is made again from x, σ(y) (1 + y (1 - σ(y))) is its derivative."""
    z = (values - centre[None, :]) * scale[None, :]
    if SILU:
        y = z * gamma[None, :] + beta[None, :]
        s = 1.0 / (1.0 + tl.exp(-y))
        grad = grad * s * (1.0 + y * (1.0 - s))
    return z, grad


@triton.jit
def slopes(
    x, grad, mean, rstd, weight, bias, partial, places, channels, width, groups,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over a tile's places of dL/dy and of dL/dy · z, for each channel; outside the image the slope is 0."""
    offsets, inside, channel, exists, image = _places(places, channels, ROWS, BLOCK)
    centre, scale, gamma, beta = _group(mean, rstd, weight, bias, channel, exists, width, groups)
    values = tl.load(x + image + offsets, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(grad + image + offsets, mask=inside, other=0.0).to(tl.float32)
    z, dy = _slope(values, dy, centre, scale, gamma, beta, SILU)
    tile = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * 2 * channels
    tl.store(partial + tile + channel, tl.sum(dy, 0), mask=exists)
    tl.store(partial + tile + channels + channel, tl.sum(dy * z, 0), mask=exists)


@triton.jit
def group_slopes(
    partial, weight, sums, terms, places, channels, width, COUNT: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr
):
    """For one group of one image: each channel's sums over all tiles, and the two means that dL/dx subtracts."""
    group, image = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, WIDTH)
    channel = group * width + lane
    plain, along = tl.zeros((TILES, WIDTH), tl.float32), tl.zeros((TILES, WIDTH), tl.float32)
    for start in range(0, COUNT, TILES):
        tile = start + tl.arange(0, TILES)
        here = (tile < COUNT)[:, None] & (lane < width)[None, :]
        at = partial + ((image * COUNT + tile) * 2 * channels)[:, None] + channel[None, :]
        plain += tl.load(at, mask=here, other=0.0)
        along += tl.load(at + channels, mask=here, other=0.0)
    of_beta, of_gamma = tl.sum(plain, 0), tl.sum(along, 0)
    exists = lane < width
    tl.store(sums + image * 2 * channels + channel, of_beta, mask=exists)
    tl.store(sums + image * 2 * channels + channels + channel, of_gamma, mask=exists)
    gamma = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    size = places * 1.0 * width
    out = terms + (image * tl.num_programs(0) + group) * 2
    tl.store(out, tl.sum(gamma * of_beta, 0) / size)
    tl.store(out + 1, tl.sum(gamma * of_gamma, 0) / size)


@triton.jit
def input_slope(
    x, grad, mean, rstd, weight, bias, terms, out, places, channels, width, groups,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dL/dx = rstd (γ dL/dy - mean(γ dL/dy) - z mean(γ dL/dy z)), means over the group."""
    offsets, inside, channel, exists, image = _places(places, channels, ROWS, BLOCK)
    centre, scale, gamma, beta = _group(mean, rstd, weight, bias, channel, exists, width, groups)
    at = terms + (tl.program_id(2) * groups + channel // width) * 2
    plain, along = tl.load(at, mask=exists, other=0.0), tl.load(at + 1, mask=exists, other=0.0)
    values = tl.load(x + image + offsets, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(grad + image + offsets, mask=inside, other=0.0).to(tl.float32)
    z, dy = _slope(values, dy, centre, scale, gamma, beta, SILU)
    dx = scale[None, :] * (gamma[None, :] * dy - plain[None, :] - z * along[None, :])
    tl.store(out + image + offsets, dx.to(out.dtype.element_ty), mask=inside)


def rows_of(places: int) -> int:
    """Places of a tile: many programs for a small image, few partial sums for a large one."""
    return 32 if places <= 1024 else 64 if places <= 4096 else 128


def warps_of(rows: int, block: int, values: int) -> int:
    """Warps of a tile with so many values of each tensor a thread."""
    return max(rows * block // (32 * values), 1)


def tiles_of(lanes: int) -> int:
    """Tiles at once of a group with so many channels, a power of two."""
    return max(GROUP_VALUES // lanes, 1)


def _grid(
    x: Tensor, groups: int, values: int
) -> tuple[tuple[int, int, int], tuple[int, int], dict[str, int], dict[str, int]]:
    """(grid over tiles, grid over groups, options of kernels over tiles, of kernels over groups)."""
    images, channels, height, width = x.shape
    rows, block = rows_of(height * width), min(CHANNELS, triton.next_power_of_2(channels))
    tiles = triton.cdiv(height * width, rows)
    over_tiles = {"ROWS": rows, "BLOCK": block, "num_warps": warps_of(rows, block, values)}
    lanes = triton.next_power_of_2(channels // groups)
    over_groups = {"COUNT": tiles, "TILES": tiles_of(lanes), "WIDTH": lanes, "num_warps": GROUP_WARPS}
    return (tiles, triton.cdiv(channels, block), images), (groups, images), over_tiles, over_groups


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, mean: Tensor, rstd: Tensor, eps: float, silu: bool
) -> None:
    """Fills `out` "n c h w", `mean` and `rstd` "n g" float32. x and out are NHWC in memory."""
    channels, places, groups = x.shape[1], x.shape[2] * x.shape[3], mean.shape[1]
    tiles, over_groups, tile_options, group_options = _grid(x, groups, FORWARD_VALUES)
    partial = torch.empty((x.shape[0], tiles[0], 2, channels), dtype=torch.float32, device=x.device)
    width = channels // groups
    moments[tiles](x, partial, places, channels, **tile_options)
    rows = tile_options["ROWS"]
    statistics[over_groups](partial, mean, rstd, places, channels, width, eps, ROWS=rows, **group_options)
    apply[tiles](x, mean, rstd, weight, bias, out, places, channels, width, groups, SILU=silu, **tile_options)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    out: Tensor,
    sums: Tensor,
    silu: bool,
) -> None:
    """Fills `out` "n c h w" with dL/dx and `sums` "n 2 c" float32 with each image's part of dL/dβ and dL/dγ."""
    channels, places, groups = x.shape[1], x.shape[2] * x.shape[3], mean.shape[1]
    tiles, over_groups, tile_options, group_options = _grid(x, groups, BACKWARD_VALUES)
    partial = torch.empty((x.shape[0], tiles[0], 2, channels), dtype=torch.float32, device=x.device)
    terms = torch.empty((x.shape[0], groups, 2), dtype=torch.float32, device=x.device)
    width = channels // groups
    given = (x, grad, mean, rstd, weight, bias)
    slopes[tiles](*given, partial, places, channels, width, groups, SILU=silu, **tile_options)
    group_slopes[over_groups](partial, weight, sums, terms, places, channels, width, **group_options)
    input_slope[tiles](*given, terms, out, places, channels, width, groups, SILU=silu, **tile_options)
