"""Randomness that belongs to the pair.

Every random number used on a pair is a function of (run seed, pair id, how often the pair was drawn before,
stream name) and of nothing else, so batch size, number of processes, loader workers and resuming change nothing.
A picture that is sampled starts from noise that belongs to its prompt and seed in the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.errors import DiffalignError

_MASK = (1 << 63) - 1  # torch seeds and int64 tensors both hold 63 bits


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & _MASK


def pair_key(run_seed: int, pair_id: str, draw: int) -> int:
    """63-bit seed of one visit to one pair; `draw` counts the earlier visits."""
    return _hash(f"{run_seed}\x1f{draw}\x1f{pair_id}")


def generator(key: int, stream: str) -> torch.Generator:
    """The CPU generator of one named stream of a pair; streams of one key are independent."""
    return torch.Generator().manual_seed(_hash(f"{key}\x1f{stream}"))


def uniform(keys: Tensor, stream: str) -> Tensor:
    """One float64 in [0, 1) for each key."""
    draws = [torch.rand((), generator=generator(k, stream), dtype=torch.float64) for k in _listed(keys)]
    return torch.stack(draws)


def integers(keys: Tensor, stream: str, low: int, high: int) -> Tensor:
    """One int64 in [low, high) for each key."""
    draws = [torch.randint(low, high, (), generator=generator(k, stream)) for k in _listed(keys)]
    return torch.stack(draws)


def normal(keys: Tensor, stream: str, shape: Sequence[int]) -> Tensor:
    """A float32 standard normal tensor of `shape` for each key, stacked on a new first axis."""
    draws = [torch.randn(tuple(shape), generator=generator(k, stream)) for k in _listed(keys)]
    return torch.stack(draws)


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU, on `device` without waiting; from memory that is not pinned a GPU's copy waits."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def noise_seed(prompt: str, seed: int) -> int:
    """The generator seed of a picture, 63 bits.

    `latents=torch.randn(1, c, h, w, generator=torch.Generator().manual_seed(noise_seed(prompt, seed)))` gives
    the same picture in plain diffusers.
    """
    digest = hashlib.blake2b(f"{seed}\n{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def initial_noise(prompts: Sequence[str], seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal float32 "n c h w" on the CPU, row i from `noise_seed(prompts[i], seeds[i])` alone."""
    generator = torch.Generator()
    rows = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        generator.manual_seed(noise_seed(prompt, seed))
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


def _listed(keys: Tensor) -> list[int]:
    if keys.dtype != torch.int64 or keys.ndim != 1 or keys.device.type != "cpu" or not len(keys):
        raise DiffalignError(
            f"pair keys must be a non-empty int64 [pair] tensor on the CPU, got {keys.dtype} "
            f"{tuple(keys.shape)} on {keys.device}; make them with pair_key()"
        )
    return [int(k) for k in keys]
