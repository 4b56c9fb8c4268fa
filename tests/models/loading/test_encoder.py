from __future__ import annotations

import copy
import logging
import shutil

import pytest
import torch
from diffusers import AutoencoderTiny
from torch.nn.functional import pixel_unshuffle

from diffalign.models.adapters.save_load import load_pipeline
from diffalign.models.loading.base import Base, load_base
from diffalign.models.loading.encoder import Encoder
from tests.models.conftest import Model

PROMPTS = ["a red circle", "", "a photo of the small green square, with words nobody knows"]


def fresh(model: Model) -> Base:
    return copy.deepcopy(model.base)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_moments_are_the_vaes_own_scaled(model: Model, pixels):
    moments = Encoder(model.base).moments(pixels)
    with torch.no_grad():
        posterior = model.base.vae.encode(pixels).latent_dist
    mean, std = moments.chunk(2, dim=1)
    scale = model.base.vae.config.scaling_factor
    assert moments.shape == (2, 8, 16, 16)
    assert torch.equal(mean, posterior.mean * scale)
    assert torch.equal(std, posterior.std * scale)
    assert std.min() > 0


def test_shift_and_channel_statistics_are_applied(model: Model, pixels):
    base = fresh(model)
    with torch.no_grad():
        posterior = base.vae.encode(pixels).latent_dist
    base.vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    mean, std = Encoder(base).moments(pixels).chunk(2, dim=1)
    torch.testing.assert_close(mean, (posterior.mean - 0.25) * 0.5)
    torch.testing.assert_close(std, posterior.std * 0.5)

    means, stds = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]
    base.vae.register_to_config(latents_mean=means, latents_std=stds, shift_factor=None)
    mean, std = Encoder(base).moments(pixels).chunk(2, dim=1)
    m, s = torch.tensor(means).view(1, 4, 1, 1), torch.tensor(stds).view(1, 4, 1, 1)
    torch.testing.assert_close(mean * s / 0.5 + m, posterior.mean)  # the SDXL pipeline's decoding undoes it
    torch.testing.assert_close(std, posterior.std * 0.5 / s)


def test_big_images_go_through_one_at_a_time(model: Model, pixels, monkeypatch):
    encoder, seen = Encoder(model.base), []
    whole = encoder.moments(pixels)
    encode = model.base.vae.encode
    monkeypatch.setattr(model.base.vae, "encode", lambda x: seen.append(len(x)) or encode(x))
    monkeypatch.setattr("diffalign.models.loading.encoder.SLICE_ABOVE_PIXELS", 64 * 64 - 1)
    torch.testing.assert_close(encoder.moments(pixels), whole)
    assert seen == [1, 1]


def test_autoencoders_without_a_distribution_have_std_zero(model: Model):
    from diffalign.world.vae import pixel_unshuffle_vae

    base = fresh(model)
    base.vae = pixel_unshuffle_vae()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = Encoder(base).moments(x).chunk(2, dim=1)
    torch.testing.assert_close(mean, pixel_unshuffle(x, 2) * base.vae.config.scaling_factor)
    assert not std.any()


def test_distilled_autoencoders_work_too(model: Model, pixels):
    base = fresh(model)
    two = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    base.vae = AutoencoderTiny(**two, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=0.5).eval()
    mean, std = Encoder(base).moments(pixels).chunk(2, dim=1)
    with torch.no_grad():
        assert torch.equal(mean, base.vae.encode(pixels).latents * 0.5)
    assert not std.any()


@pytest.mark.parametrize("shape", [(1, 3, 64, 62), (1, 1, 64, 64)])
def test_a_shape_the_vae_cannot_take_is_named(model: Model, shape):
    with pytest.raises(ValueError, match=r"multiples of 4"):
        Encoder(model.base).moments(torch.zeros(shape))


def test_prompts_are_the_pipelines_own(model: Model):
    ours = Encoder(model.base).prompts(PROMPTS)
    pipeline = load_pipeline(str(model.folder))
    for i, prompt in enumerate(PROMPTS):
        if model.base.family.name == "sd":
            positive, negative = pipeline.encode_prompt(prompt, "cpu", 1, True)
            pooled = [None, None]
        else:
            positive, negative, *pooled = pipeline.encode_prompt(prompt, device="cpu")
        # "" is the prompt the pipeline guides away from when none is given
        embeds, pool = (negative, pooled[1]) if prompt == "" else (positive, pooled[0])
        torch.testing.assert_close(ours.prompt_embeds[i : i + 1], embeds, rtol=1e-5, atol=1e-6)
        if pool is None:
            assert ours.pooled is None
        else:
            torch.testing.assert_close(ours.pooled[i : i + 1], pool, rtol=1e-5, atol=1e-6)


def test_the_null_prompt_is_zero_only_where_the_model_says_so(models):
    base = fresh(models["sdxl"])
    assert not Encoder(base).prompts([""]).prompt_embeds.any()
    assert not Encoder(base).prompts([""]).pooled.any()
    base.text.zero_empty_prompt = False
    assert Encoder(base).prompts([""]).prompt_embeds.any()
    assert Encoder(models["sd"].base).prompts([""]).prompt_embeds.any()


def test_time_ids_are_the_pipelines_own(models):
    pipeline = load_pipeline(str(models["sdxl"].folder))
    size, crop, target = (1023, 768), (3, 129), (64, 64)
    theirs = pipeline._get_add_time_ids(size, crop, target, torch.float32, text_encoder_projection_dim=48)
    encoder = Encoder(models["sdxl"].base)
    assert torch.equal(encoder.time_ids(torch.tensor([[*size, *crop, *target]])), theirs)
    assert encoder.time_ids(torch.zeros(2, 3, 6, dtype=torch.int64)).shape == (2, 3, 6)
    with pytest.raises(ValueError, match="six pixel counts"):
        encoder.time_ids(torch.zeros(2, 4))
    assert Encoder(models["sd"].base).time_ids(torch.zeros(2, 6)) is None


def test_a_prompt_that_is_cut_is_reported_once(model: Model, caplog):
    encoder = Encoder(model.base)
    long = "x" * 100  # 100 letters between two ends, 77 fit
    with caplog.at_level(logging.WARNING):
        encoder.prompts(["a red circle", long])
        encoder.prompts([long])
    assert encoder.notices.truncated == {long: 25}
    (record,) = [r for r in caplog.records if "prompt truncated by 25 tokens" in r.getMessage()]
    assert "x" * 50 in record.getMessage()
    assert len(record.getMessage()) < 140


def test_thousands_of_cut_prompts_do_not_flood_the_log(model: Model, caplog):
    encoder = Encoder(model.base)
    with caplog.at_level(logging.WARNING):
        encoder.prompts([f"{i} " + "x" * 100 for i in range(12)])
    assert len(encoder.notices.truncated) == 12
    assert len([r for r in caplog.records if "truncated" in r.getMessage()]) == 6


def test_fingerprint_follows_everything_that_decides_the_encoding(model: Model):
    first = Encoder(fresh(model)).fingerprint
    assert Encoder(fresh(model)).fingerprint == first

    def changed(change) -> str:
        base = fresh(model)
        change(base)
        return Encoder(base).fingerprint

    def nudge(module):
        parameter = list(module.parameters())[-1]
        parameter.data.view(-1)[-1] += 1e-3

    changes = [
        lambda b: nudge(b.vae),
        lambda b: nudge(b.text.models[-1]),
        lambda b: b.vae.register_to_config(scaling_factor=0.2),
        lambda b: setattr(b.text.models[0].config, "hidden_act", "relu"),
        lambda b: setattr(b.text, "zero_empty_prompt", not b.text.zero_empty_prompt),
        lambda b: setattr(b.text.tokenizers[0], "model_max_length", 40),
    ]
    prints = [changed(change) for change in changes] + [Encoder(fresh(model), dtype=torch.bfloat16).fingerprint]
    assert len({first, *prints}) == len(changes) + 2


def test_fingerprint_does_not_follow_use_or_place(model: Model, tmp_path):
    encoder = Encoder(fresh(model))
    encoder.prompts(["a red circle"])  # leaves padding and truncation set in the tokenizers
    moved = load_base(str(shutil.copytree(model.folder, tmp_path / "elsewhere")))
    assert Encoder(moved).fingerprint == encoder.fingerprint


def test_lower_precision_comes_back_as_float32_and_close(model: Model, pixels):
    exact = Encoder(model.base).moments(pixels)
    low = Encoder(fresh(model), dtype=torch.bfloat16)
    moments, embeds = low.moments(pixels), low.prompts(PROMPTS)
    assert moments.dtype == embeds.prompt_embeds.dtype == torch.float32
    assert (moments - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_vae_that_overflows_in_half_stays_in_float32(model: Model):
    base = fresh(model)
    base.vae.register_to_config(force_upcast=True)
    Encoder(base, dtype=torch.float16)
    assert {p.dtype for p in base.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in base.text.models[0].parameters()} == {torch.float16}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pinned_pixels_reach_the_device_without_waiting(model: Model, pixels, dtype):
    encoder = Encoder(fresh(model), "cuda", dtype)
    expected = encoder.moments(pixels)
    pinned = pixels.pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moments = encoder.moments(pinned)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(moments, expected)


def test_unload_frees_the_base_and_keeps_the_fingerprint(model: Model, pixels):
    base = fresh(model)
    encoder = Encoder(base)
    before = Encoder(fresh(model)).fingerprint
    encoder.unload()
    assert base.vae is None
    assert base.text is None
    assert encoder.fingerprint == before
    with pytest.raises(RuntimeError, match="load_base"):
        encoder.moments(pixels)
    with pytest.raises(ValueError, match="vae_and_text"):
        Encoder(base)
