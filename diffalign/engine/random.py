"""Random numbers that belong to a pair.

Every random number of a pair depends on the run's seed, the pair's id, the number of earlier visits to the pair, and
the name of a stream. It depends on nothing else, so batch size, number of processes, loader workers and resuming
change no result. In the same way, the initial noise of a sampled image depends on its prompt and seed alone.
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
    """The seed of one visit to one pair, 63 bits; `draw` is the number of earlier visits."""
    return _hash(f"{run_seed}\x1f{draw}\x1f{pair_id}")


def generator(key: int, stream: str) -> torch.Generator:
    """A CPU generator for one named stream of a pair's key; the streams of one key are independent."""
    return torch.Generator().manual_seed(_hash(f"{key}\x1f{stream}"))


def uniform(keys: Tensor, stream: str) -> Tensor:
    """One uniform number in [0, 1) for each key: float64 [pair]."""
    draws = [torch.rand((), generator=generator(k, stream), dtype=torch.float64) for k in _listed(keys)]
    return torch.stack(draws)


def integers(keys: Tensor, stream: str, low: int, high: int) -> Tensor:
    """One uniform integer in [low, high) for each key: int64 [pair]."""
    draws = [torch.randint(low, high, (), generator=generator(k, stream)) for k in _listed(keys)]
    return torch.stack(draws)


def normal(keys: Tensor, stream: str, shape: Sequence[int]) -> Tensor:
    """One standard normal tensor of `shape` for each key: float32 [pair, *shape]."""
    draws = [torch.randn(tuple(shape), generator=generator(k, stream)) for k in _listed(keys)]
    return torch.stack(draws)


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`. It is pinned first, because a copy to a GPU from other memory waits for the GPU."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def noise_seed(prompt: str, seed: int) -> int:
    """The generator's seed of an image, 63 bits.

    `latents=torch.randn(1, c, h, w, generator=torch.Generator().manual_seed(noise_seed(prompt, seed)))` gives the same
    image in a pipeline of diffusers.
    """
    digest = hashlib.blake2b(f"{seed}\n{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def initial_noise(prompts: Sequence[str], seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise "n c h w", float32 on the CPU; row i depends on `prompts[i]` and `seeds[i]` alone."""
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
