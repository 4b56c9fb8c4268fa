"""The autoencoder is a pixel-unshuffle, exact both ways, and a plain diffusers class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC

from diffalign.world.captions import splits
from diffalign.world.render import render
from diffalign.world.vae import pixel_unshuffle_vae, to_latents


def test_encoder_is_pixel_unshuffle_and_decoder_its_inverse() -> None:
    vae = pixel_unshuffle_vae()
    pixels = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 4 - 2
    latents = vae.encode(pixels).latent
    assert torch.equal(latents, torch.nn.functional.pixel_unshuffle(pixels, 2))
    torch.testing.assert_close(vae.decode(latents).sample, pixels, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_two_grey_levels(dtype: torch.dtype) -> None:
    vae = pixel_unshuffle_vae().to(dtype)
    pixels = torch.linspace(-1, 1, 768).view(1, 3, 16, 16)
    decoded = vae.decode(vae.encode(pixels.to(dtype)).latent).sample.float()
    assert ((decoded - pixels).abs() * 127.5).max() < 2


def test_latents_of_training_renders_have_unit_std() -> None:
    pictures = torch.from_numpy(render(splits()["train"] * 10, np.random.default_rng(0)))
    latents = to_latents(pixel_unshuffle_vae(), pictures.permute(0, 3, 1, 2) / 127.5 - 1)
    assert latents.std().item() == pytest.approx(1.0, abs=0.05)


def test_saved_and_loaded_it_is_the_same(tmp_path) -> None:
    vae = pixel_unshuffle_vae()
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderDC.from_pretrained(tmp_path)
    assert len(loaded.config.block_out_channels) == 2  # pipelines read the downsampling factor, 2, off it
    assert loaded.config.scaling_factor == vae.config.scaling_factor
    assert all(torch.equal(a, b) for a, b in zip(vae.state_dict().values(), loaded.state_dict().values()))
