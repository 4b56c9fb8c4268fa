from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler

from diffalign.engine.random import initial_noise, noise_seed
from diffalign.errors import DiffalignError
from diffalign.evaluation.sampling import (
    SCHEDULERS,
    Sampling,
    default_batch,
    make_scheduler,
    sample_images,
)
from diffalign.models.adapters.save_load import load_pipeline

PROMPTS = ["a red circle", "a blue square", "a red circle", "a small photo", "the large square"]
SEEDS = [0, 0, 1, 2, 3]


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request, tiny):
    return load_pipeline(tiny[request.param])


def arrays(images):
    return np.stack([np.asarray(image, int) for image in images])


def test_an_image_depends_on_its_prompt_and_seed_only(pipe):
    together = arrays(sample_images(pipe, PROMPTS, SEEDS, Sampling(num_inference_steps=3, batch_size=5)))
    batches = arrays(sample_images(pipe, PROMPTS, SEEDS, Sampling(num_inference_steps=3, batch_size=2)))
    alone = arrays(sample_images(pipe, PROMPTS[3:4], SEEDS[3:4], Sampling(num_inference_steps=3)))
    assert np.abs(together - batches).max() <= 1  # kernels round differently for other batch sizes
    assert np.abs(together[3] - alone[0]).max() <= 1
    assert np.abs(together[0] - together[2]).max() > 1  # same prompt, other seed
    assert np.abs(together[0] - together[1]).max() > 1


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_plain_diffusers_makes_the_same_image(pipe, guidance):
    from diffusers import DDIMScheduler

    ours = arrays(sample_images(pipe, PROMPTS[:1], [7], Sampling(num_inference_steps=3, guidance_scale=guidance)))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(noise_seed(PROMPTS[0], 7)))
    theirs = arrays(
        pipe(PROMPTS[0], latents=noise, num_inference_steps=3, guidance_scale=guidance, width=64, height=64).images
    )
    assert np.abs(ours - theirs).max() <= 1


def test_a_negative_prompt_changes_the_image(pipe):
    plain = arrays(sample_images(pipe, PROMPTS[:1], [0], Sampling(num_inference_steps=3)))
    steered = arrays(
        sample_images(pipe, PROMPTS[:1], [0], Sampling(num_inference_steps=3, negative_prompt="a blue square"))
    )
    assert np.abs(plain - steered).max() > 0


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_keep_the_models_own_settings(pipe, name):
    scheduler = make_scheduler(pipe, name)
    assert type(scheduler).__name__ == SCHEDULERS[name]
    for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset"):
        assert scheduler.config[key] == pipe.scheduler.config[key]
    if name == "ddim":
        assert not scheduler.config.clip_sample
    assert len(sample_images(pipe, PROMPTS[:1], [0], Sampling(num_inference_steps=3, scheduler=name))) == 1


def test_a_pipeline_of_other_noise_is_refused():
    """A DDIM made from its config would have a table of its own."""
    other = SimpleNamespace(scheduler=EDMEulerScheduler())
    with pytest.raises(DiffalignError, match=r"EDMEulerScheduler.*EDM.*SDXL"):
        make_scheduler(other, "ddim")


def test_training_goes_on_as_if_nothing_had_happened(pipe):
    pipe.unet.train()
    pipe.unet.conv_in.eval()  # a mixed state must survive
    modes = [module.training for module in pipe.unet.modules()]
    before = pipe.scheduler
    states = (torch.get_rng_state().clone(), random.getstate(), np.random.get_state()[1].copy())
    sample_images(pipe, PROMPTS[:2], SEEDS[:2], Sampling(num_inference_steps=2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert [module.training for module in pipe.unet.modules()] == modes
    assert pipe.scheduler is before
    assert pipe._progress_bar_config == {}


def test_dropout_is_off_while_sampling(pipe):
    from torch import nn

    expected = arrays(sample_images(pipe, PROMPTS[:1], [0], Sampling(num_inference_steps=2)))
    pipe.unet.train()
    for module in pipe.unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    assert (arrays(sample_images(pipe, PROMPTS[:1], [0], Sampling(num_inference_steps=2))) == expected).all()


def test_an_image_of_nan_is_named(pipe):
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="prompt 'a red circle', seed 5 is NaN"):
        sample_images(pipe, PROMPTS[:1], [5], Sampling(num_inference_steps=2))
    assert pipe.scheduler.config._class_name != "DDIMScheduler"  # restored although it failed


def test_noise_is_standard_normal_and_independent():
    noise = initial_noise(["a"] * 200 + ["b"] * 200, list(range(200)) * 2, (4, 8, 8))
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    same_seed = (noise[:200] * noise[200:]).mean()  # other prompt, same seed: another draw
    assert abs(same_seed) < 0.02
    assert torch.equal(initial_noise(["b"], [3], (4, 8, 8))[0], noise[203])


def test_batches_shrink_with_resolution():
    assert [default_batch(size) for size in (16, 512, 1024, 4096)] == [64, 16, 4, 1]


@pytest.mark.parametrize("pixels", [1, 33])
def test_a_resolution_that_the_network_cannot_halve_is_refused(pipe, pixels):
    least = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    assert len(sample_images(pipe, ["a"], [0], Sampling(num_inference_steps=1, resolution=least))) == 1
    with pytest.raises(DiffalignError, match=rf"resolution: {pixels} pixels .* use a multiple .* at least {least}"):
        sample_images(pipe, ["a"], [0], Sampling(num_inference_steps=1, resolution=pixels))


def test_unknown_scheduler(pipe):
    with pytest.raises(ValueError, match="allowed: ddim, euler, dpmsolver"):
        sample_images(pipe, ["a"], [0], Sampling(scheduler="dddim"))
