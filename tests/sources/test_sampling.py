"""Our sampler against diffusers' pipelines with DDIMScheduler: same weights, same noise, same images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffalign.data.loader.text import TextMemo
from diffalign.data.transforms import to_images
from diffalign.engine.random import initial_noise
from diffalign.models.adapters.save_load import load_pipeline
from diffalign.models.spec import ModelSpec
from diffalign.sources.base import Context
from diffalign.sources.sampling import LatentSampling, sample_latents

PROMPTS = ["a red circle", "a blue square", "a red circle"]
SEEDS = [0, 0, 7]
MakeContext = Callable[..., Context]


def sample(context: Context, prompts: list[str], seeds: list[int], guidance: float = 5.0, batch_size: int = 3):
    text = TextMemo(context.encoder)
    sampling = LatentSampling(4, guidance, batch_size, "test")
    return sample_latents(context, text, context.networks.policy, prompts, seeds, sampling)


@pytest.mark.parametrize(
    ("family", "kind", "guidance"),
    [("sd", "epsilon", 5.0), ("sdxl", "epsilon", 5.0), ("sdxl", "v_prediction", 5.0), ("sd", "epsilon", 1.0)],
)
def test_latents_and_images_are_the_pipelines(
    family: str, kind: str, guidance: float, make_context: MakeContext, request: pytest.FixtureRequest
) -> None:
    context = make_context(family, PROMPTS, kind=kind)
    ours = sample(context, PROMPTS, SEEDS, guidance)
    folder: Path = request.getfixturevalue(f"tiny_{family}")
    pipe = load_pipeline(ModelSpec(folder, prediction_type=kind))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": guidance, "width": 64, "height": 64}
    noise = initial_noise(PROMPTS, SEEDS, (4, 16, 16))
    theirs = pipe(PROMPTS, latents=noise, output_type="latent", **settings).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # float32, four steps, guidance multiplies rounding
    decoded = pipe(PROMPTS, latents=noise, output_type="pil", **settings).images
    mine = to_images(context.encoder.decode(ours), PROMPTS, SEEDS)
    for a, b in zip(mine, decoded, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_a_latent_depends_on_its_prompt_and_seed_only(make_context: MakeContext) -> None:
    context = make_context("sdxl", PROMPTS)
    together, alone = sample(context, PROMPTS, SEEDS), sample(context, PROMPTS, SEEDS, batch_size=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert float((together[0] - together[2]).abs().max()) > 0.1
    assert sample(context, [], []).shape == (0, 4, 16, 16)


def test_decoding_goes_one_by_one_above_a_size_and_in_the_vaes_own_dtype(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffalign.models.loading.decoder as module

    context = make_context("sd", PROMPTS)
    latents = torch.randn(3, 4, 16, 16)
    whole, seen = context.encoder.decode(latents), []
    decode = context.encoder.base.vae.decode
    monkeypatch.setattr(context.encoder.base.vae, "decode", lambda x, **kw: seen.append(x.shape) or decode(x, **kw))
    monkeypatch.setattr(module, "SLICE_ABOVE_PIXELS", 64 * 64 - 1)
    torch.testing.assert_close(context.encoder.decode(latents), whole, rtol=1e-4, atol=1e-5)
    assert [shape[0] for shape in seen] == [1, 1, 1]


def test_an_image_that_is_nan_is_named(make_context: MakeContext) -> None:
    context = make_context("sd", PROMPTS)
    latents = torch.zeros(2, 4, 16, 16)
    latents[1] = torch.nan
    with pytest.raises(ValueError, match="prompt 'a blue square', seed 4 is NaN"):
        to_images(context.encoder.decode(latents), PROMPTS[:2], [3, 4])
