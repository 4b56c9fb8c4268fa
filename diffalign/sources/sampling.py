"""Latents sampled from a network of the run: DDIM with guidance on the model's own grid, as `evaluation` samples.

The starting noise belongs to prompt and seed, so the latents of an image depend neither on its neighbours nor on the
number of processes, up to the rounding of kernels. Left out: stochastic samplers; those record what they do and have a
file of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.data.loader.loaded import NULL_PROMPT
from diffalign.data.loader.text import for_pairs
from diffalign.engine.ddim import step
from diffalign.engine.measure import Network, guided
from diffalign.engine.random import initial_noise
from diffalign.engine.schedule import NoiseSchedule
from diffalign.io.progress import Progress
from diffalign.models.loading.encoder import Encoder
from diffalign.sources.base import Context
from diffalign.types import Conditioning

Text = Callable[[tuple[str, ...]], tuple[Tensor, Tensor | None]]  # prompts -> embeddings and pooled ones, on the device


@dataclass(frozen=True)
class LatentSampling:
    """How latents are sampled while training."""

    num_inference_steps: int
    guidance_scale: float  # at most 1: no guidance
    batch_size: int  # images through the network at a time, twice as many rows with guidance
    title: str  # of the progress bar


@torch.no_grad()
def sample_latents(
    context: Context,
    text: Text,
    network: Network,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: LatentSampling,
) -> Tensor:
    """Clean latents float32 "n c h w" on the CPU; image i is of `prompts[i]` from the noise of `seeds[i]`.

    `network` is `context.networks.policy` or `.reference`.
    """
    parts = []
    with Progress(total=len(prompts), desc=sampling.title, unit="img", leave=False, disable=not context.main) as bar:
        for start in range(0, len(prompts), sampling.batch_size):
            part = slice(start, start + sampling.batch_size)
            some, own = tuple(prompts[part]), seeds[part]
            cond, uncond = guidance_conditioning(
                context.encoder, text, some, sampling.guidance_scale, context.resolution
            )
            noise = initial_noise(some, own, context.latent_shape).to(context.device)
            x0 = _descend(context.networks.schedule, network, noise, cond, uncond, sampling)
            parts.append(x0.float().cpu())
            bar.update(len(some))
    return torch.cat(parts) if parts else torch.empty(0, *context.latent_shape)


def guidance_conditioning(
    encoder: Encoder, text: Text, prompts: tuple[str, ...], guidance_scale: float, resolution: int
) -> tuple[Conditioning, Conditioning | None]:
    """Flat conditioning of some images to be sampled, and the null prompt's where they are guided (scale > 1)."""
    embeds, pooled = text(prompts)
    time_ids = encoder.time_ids(sampled_geometry(resolution, len(prompts)))
    if time_ids is not None:
        time_ids = time_ids.to(embeds.device)
    cond = Conditioning(embeds, pooled, time_ids)
    if guidance_scale <= 1:
        return cond, None
    return cond, Conditioning(*for_pairs(text((NULL_PROMPT,)), len(prompts)), time_ids)


def sampled_geometry(resolution: int, n: int) -> Tensor:
    """SDXL's geometry int64 "n 6" of images that were made at this size: nothing was resized, nothing cropped."""
    return torch.tensor([resolution, resolution, 0, 0, resolution, resolution]).expand(n, 6)


def _descend(
    s: NoiseSchedule,
    network: Network,
    xt: Tensor,
    cond: Conditioning,
    uncond: Conditioning | None,
    sampling: LatentSampling,
) -> Tensor:
    """`engine.ddim.sample` with η = 0 for a raw prediction, from which x̂_0 follows even where ᾱ_t = 0."""
    grid = s.timesteps(sampling.num_inference_steps)
    following = torch.cat([grid[1:], grid.new_full((1,), -1)])
    for t, t_prev in zip(grid, following, strict=True):
        t_all, prev_all = t.expand(len(xt)), t_prev.expand(len(xt))
        prediction = guided(network, xt, t_all.to(xt.device), cond, sampling.guidance_scale, uncond)
        eps, x0 = s.to_eps(prediction, xt, t_all), s.to_x0(prediction, xt, t_all)
        xt = step(s, eps, xt, t_all, prev_all, x0=x0).prev
    return xt
