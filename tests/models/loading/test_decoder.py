"""Latents to pixels: equal to the pipelines' decoding, and back to what was encoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffalign.models.loading.base import load_base
from diffalign.models.loading.decoder import decode_latents
from diffalign.models.loading.encoder import Encoder
from diffalign.world import base_path


def test_it_decodes_as_the_pipeline(tiny_sd: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    made = pipe(
        ["a red circle"] * 3, latents=latents, num_inference_steps=1, guidance_scale=1.0, output_type="latent"
    ).images
    expected = pipe.vae.decode(made / pipe.vae.config.scaling_factor).sample.detach()
    torch.testing.assert_close(decode_latents(load_base(str(tiny_sd)).vae, made), expected, rtol=0, atol=1e-6)


def test_it_undoes_the_worlds_encoder() -> None:
    base = load_base(str(base_path()))
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = Encoder(base).moments(pixels).chunk(2, dim=1)[0]
    torch.testing.assert_close(decode_latents(base.vae, mean), pixels, rtol=0, atol=2e-6)  # its norm rounds


def test_large_images_go_one_at_a_time(monkeypatch: pytest.MonkeyPatch, tiny_sd: Path) -> None:
    vae, seen = load_base(str(tiny_sd)).vae, []
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    together = decode_latents(vae, latents)
    real = vae.decode
    monkeypatch.setattr("diffalign.models.loading.decoder.SLICE_ABOVE_PIXELS", 8 * 8)
    monkeypatch.setattr(vae, "decode", lambda x, **kw: (seen.append(len(x)), real(x, **kw))[1])
    torch.testing.assert_close(decode_latents(vae, latents), together, rtol=0, atol=1e-5)
    assert seen == [1, 1]
