"""The autoencoder: linear, close to lossless on renders, and of the right scale."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderDC

from diffalign.world.emoji.vae import fitted_vae, to_latents, training_pixels


@pytest.fixture(scope="module")
def vae() -> AutoencoderDC:
    return fitted_vae()


def test_renders_come_back(vae: AutoencoderDC) -> None:
    pixels = training_pixels(96, seed=5)  # not those of the fit
    latents = to_latents(vae, pixels)
    assert latents.shape == (96, 12, 16, 16)
    assert 0.9 < latents.std() < 1.1
    error = (vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1) - pixels).square().mean()
    assert -10 * torch.log10(error / 4) > 33  # dB, of a range of 2


def test_it_is_linear(vae: AutoencoderDC) -> None:
    x, y = training_pixels(2, seed=7).split(1)
    middle = to_latents(vae, (x + y) / 2)
    assert torch.allclose(middle, (to_latents(vae, x) + to_latents(vae, y)) / 2, atol=1e-4)
