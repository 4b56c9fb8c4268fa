"""Scaled latents back to pictures: the counterpart of `encoder.Encoder.moments`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffalign.models.base import vae_factor
from diffalign.models.encoder import SLICE_ABOVE_PIXELS, latent_scaling


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Pixels "n 3 H W" float32 of scaled latents "n c h w"; nominally in [−1, 1], not clipped."""
    height, width = (side * vae_factor(vae) for side in latents.shape[-2:])
    chunk = 1 if height * width > SLICE_ABOVE_PIXELS else len(latents)
    return torch.cat([_decode(vae, part) for part in latents.split(chunk)])


def _decode(vae: nn.Module, latents: Tensor) -> Tensor:
    shift, scale = latent_scaling(vae, latents)
    unscaled = latents / scale + shift
    return vae.decode(unscaled.to(next(vae.parameters()).dtype), return_dict=False)[0].float()
