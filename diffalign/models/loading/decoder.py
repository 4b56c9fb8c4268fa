"""Scaled latents back to images, and the scaling of latents: the inverse of `encoder.Encoder.moments`."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.models.loading.base import vae_factor
from diffalign.models.loading.modules import VAE

# Images with more pixels go through the VAE one at a time: at 1024 px its activations are several GB each.
SLICE_ABOVE_PIXELS = 768 * 768


@torch.no_grad()
def decode_latents(vae: VAE, latents: Tensor) -> Tensor:
    """Pixels "n 3 H W" float32 of scaled latents "n c h w" on the VAE's device; nominally in [−1, 1], not clipped."""
    height, width = (side * vae_factor(vae) for side in latents.shape[-2:])
    chunk = 1 if height * width > SLICE_ABOVE_PIXELS else len(latents)
    return torch.cat([_decode(vae, part.float()) for part in latents.split(chunk)])


def latent_scaling(vae: VAE, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(shift, scale) of "latent = (vae mean − shift) · scale", from scaling_factor, shift_factor, latents_mean/std.

    A VAE with per-channel statistics uses them in place of shift_factor, as the SDXL pipeline does in decoding.
    """
    config = vae.config
    factor = float(config.scaling_factor)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        return like.new_tensor(mean).view(1, -1, 1, 1), factor / like.new_tensor(std).view(1, -1, 1, 1)
    return float(getattr(config, "shift_factor", None) or 0.0), factor


def _decode(vae: VAE, latents: Tensor) -> Tensor:
    shift, scale = latent_scaling(vae, latents)
    unscaled = latents / scale + shift
    return vae.decode(unscaled.to(next(vae.parameters()).dtype), return_dict=False)[0].float()
