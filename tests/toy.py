"""A toy network and a toy batch in plain torch, for tests below the level of models."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffalign.engine.random import pair_key
from diffalign.engine.schedule import NoiseSchedule
from diffalign.types import Conditioning, PairBatch, Transitions

SDXL_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}


class ToyNetwork(nn.Module):
    """A two-layer convolution that looks at x_t, t and the conditioning; every sample by itself."""

    def __init__(self, channels: int = 4, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, width, 3, padding=1)
        self.time = nn.Linear(2, width)
        self.text = nn.Linear(6, width)
        self.outer = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        angle = t.to(xt.dtype)[:, None] / 300
        told = self.time(torch.cat([angle.sin(), angle.cos()], 1)) + self.text(cond.prompt_embeds.mean(1))
        return self.outer(torch.tanh(self.inner(xt) + told[:, :, None, None]))


@dataclass
class ToyModels:
    """The Models protocol on two toy networks, with a count of the calls."""

    net: nn.Module
    frozen: nn.Module
    schedule: NoiseSchedule
    policy_calls: int = 0
    reference_calls: int = 0

    def policy(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.policy_calls += 1
        return self.net(xt, t, cond)

    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.reference_calls += 1
        return self.frozen(xt, t, cond)


def toy_models(dtype: torch.dtype = torch.float64, apart: float = 0.0, **config: object) -> ToyModels:
    """A policy and its reference; `apart` > 0 moves the policy's weights by that much noise."""
    torch.manual_seed(0)
    net = ToyNetwork().to(dtype)
    frozen = copy.deepcopy(net).requires_grad_(False)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(apart * torch.randn_like(p))
    return ToyModels(net, frozen, NoiseSchedule.from_config({**SDXL_CONFIG, **config}))


def toy_batch(pairs: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> PairBatch:
    """Random latents, prompt embeddings, null prompt and scores of a few pairs."""
    g = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, pairs, 5, 6, generator=g, dtype=dtype)
    latents = torch.randn(2, pairs, 4, 6, 6, generator=g, dtype=dtype)
    return PairBatch(
        latents=latents,
        cond=Conditioning(embeds.expand(2, -1, -1, -1)),
        keys=torch.tensor([pair_key(seed, f"pair-{i}", 0) for i in range(pairs)]),
        uncond=Conditioning(torch.full_like(embeds, 0.3).expand(2, -1, -1, -1)),
        scores=torch.rand(2, pairs, generator=g, dtype=dtype),
        transitions=toy_transitions(pairs, dtype, seed),
    )


def toy_transitions(pairs: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> Transitions:
    """Two short steps of each pair from one random x_t, on a grid of 20 steps."""
    g = torch.Generator().manual_seed(seed + 1)
    noisy = torch.randn(1, pairs, 4, 6, 6, generator=g, dtype=dtype).expand(2, -1, -1, -1, -1)
    t = 51 + 50 * torch.randint(0, 19, (pairs,), generator=g)
    moved = 0.3 * torch.randn(2, pairs, 4, 6, 6, generator=g, dtype=dtype)
    return Transitions(noisy=noisy, clean=noisy + moved, t=t, t_prev=t - 50)


def single(batch: PairBatch, i: int) -> PairBatch:
    """One pair of a batch as a batch of its own."""
    return batch.select(pair=slice(i, i + 1))
