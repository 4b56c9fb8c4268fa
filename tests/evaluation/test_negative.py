"""Guidance with a second network: one network's result where both are equal, and the formula otherwise."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from diffalign.contrib.negative_guidance import NegativeGuidance, load_negative, negative_branch
from diffalign.evaluation.evaluate import evaluate
from diffalign.evaluation.generate import generate
from diffalign.evaluation.recipe import Tuned
from diffalign.evaluation.sampling import Sampling, sample_images
from diffalign.models.adapters.lora import add_lora, save_lora
from diffalign.models.adapters.save_load import load_pipeline
from diffalign.models.loading.family import ModelError
from tests.evaluation.test_evaluate import Brightness

PROMPTS, SEEDS = ["a red circle", "a blue square", "a small photo"], [0, 1, 2]


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request, tiny):
    return load_pipeline(tiny[request.param])


def moved(unet):
    """A copy with other weights."""
    other = copy.deepcopy(unet)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return other


def latents(pipe, **settings):
    """Three DDIM steps in float64, as numbers: no image's rounding hides a difference."""
    from diffusers import DDIMScheduler

    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return pipe(
        PROMPTS[:2], latents=noise, num_inference_steps=3, width=64, height=64, output_type="latent", **settings
    ).images


def test_an_equal_network_gives_ordinary_guidance(pipe):
    plain = sample_images(pipe, PROMPTS, SEEDS, Sampling(num_inference_steps=3, guidance_scale=4.0))
    split = sample_images(
        pipe,
        PROMPTS,
        SEEDS,
        Sampling(num_inference_steps=3, guidance_scale=4.0),
        guidance=NegativeGuidance(copy.deepcopy(pipe.unet)),
    )
    for one, two in zip(plain, split, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(two, int)).max() <= 1
    pipe.to(torch.float64)
    expected = latents(pipe, guidance_scale=4.0)
    with negative_branch(pipe, pipe.unet.__class__.forward.__get__(copy.deepcopy(pipe.unet))):
        found = latents(pipe, guidance_scale=4.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert torch.equal(latents(pipe, guidance_scale=4.0), expected)  # and nothing is left behind


@pytest.mark.parametrize("negative_prompt", [None, "a blue square"])
def test_two_networks_are_combined_as_the_formula_says(pipe, negative_prompt):
    """ε = ε_neg(x, ∅) + g (ε_pos(x, c) − ε_neg(x, ∅)), written out with two pipelines' single branches."""
    pipe.to(torch.float64)
    negative, g = moved(pipe.unet), 4.0
    inputs = {}

    def note(sample, t, **kwargs):  # what the pipeline asks at its first step
        inputs.setdefault("first", (sample, t, kwargs))
        return (torch.zeros_like(sample),)

    own = pipe.unet.forward
    pipe.unet.forward = note
    texts = {} if negative_prompt is None else {"negative_prompt": [negative_prompt] * 2}
    latents(pipe, guidance_scale=g, **texts)
    pipe.unet.forward = own
    sample, t, kwargs = inputs["first"]
    with torch.no_grad():
        whole = {key: value for key, value in kwargs.items() if key != "return_dict"}
        no_text = negative(sample, t, **whole).sample[:2]
        text = pipe.unet(sample, t, **whole).sample[2:]
    by_hand = no_text + g * (text - no_text)

    seen = []
    with negative_branch(pipe, negative):
        step = pipe.scheduler.__class__.step

        def watch(self, epsilon, *args, **kwargs):
            seen.append(epsilon)
            return step(self, epsilon, *args, **kwargs)

        pipe.scheduler.__class__.step = watch
        try:
            latents(pipe, guidance_scale=g, **texts)
        finally:
            pipe.scheduler.__class__.step = step
    torch.testing.assert_close(seen[0], by_hand, rtol=0, atol=1e-10)
    ordinary = latents(pipe, guidance_scale=g, **texts)
    with negative_branch(pipe, negative):
        assert (latents(pipe, guidance_scale=g, **texts) - ordinary).abs().max() > 0.1


def test_without_guidance_there_is_no_branch_to_answer(pipe, tuned, tmp_path, tiny):
    with negative_branch(pipe, pipe.unet), pytest.raises(ModelError, match="guidance_scale ≤ 1 does not have"):
        latents(pipe.to(torch.float64), guidance_scale=1.0)
    with pytest.raises(ValueError, match=r"guidance_scale 1.0 has none; give one above 1"):
        generate(
            tiny["sdxl"],
            PROMPTS,
            [0],
            out_dir=tmp_path,
            sampling=Sampling(guidance_scale=1.0),
            tuned=Tuned(negative=tuned),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_answers_as_it_does_in_a_pipeline(tiny, tmp_path, dtype):
    pipe = load_pipeline(tiny["sdxl"])
    add_lora(pipe.unet, rank=4, alpha=10)
    with torch.no_grad():
        for p in pipe.unet.parameters():
            if p.requires_grad:
                p.add_(0.1)
    from diffalign.models.loading.sdxl import StableDiffusionXL

    save_lora(pipe.unet, tmp_path, StableDiffusionXL())
    negative = load_negative(tiny["sdxl"], str(tmp_path), torch_dtype=dtype)
    pipeline = load_pipeline(tiny["sdxl"], tuned=str(tmp_path), torch_dtype=dtype)
    assert {p.dtype for p in negative.parameters()} == {dtype}
    alone = sample_images(pipeline, PROMPTS[:1], [0], Sampling(num_inference_steps=2))
    both = sample_images(
        pipeline, PROMPTS[:1], [0], Sampling(num_inference_steps=2), guidance=NegativeGuidance(negative)
    )
    assert np.abs(np.asarray(alone[0], int) - np.asarray(both[0], int)).max() <= (1 if dtype is torch.float32 else 8)


def test_folders_know_their_negative_network(tiny, tuned, tmp_path):
    make = {"seeds": [0], "sampling": Sampling(num_inference_steps=2)}
    plain = generate(tiny["sdxl"], PROMPTS[:1], out_dir=tmp_path / "a", **make)
    away = generate(tiny["sdxl"], PROMPTS[:1], out_dir=tmp_path / "b", tuned=Tuned(negative=tuned), **make)
    same = generate(tiny["sdxl"], PROMPTS[:1], out_dir=tmp_path / "c", tuned=Tuned(tuned, negative=tuned), **make)
    both = generate(tiny["sdxl"], PROMPTS[:1], out_dir=tmp_path / "d", tuned=tuned, **make)
    pixels = [np.asarray(some[0].open(), int) for some in (plain, away, same, both)]
    assert np.abs(pixels[0] - pixels[1]).max() > 1
    assert np.abs(pixels[2] - pixels[3]).max() <= 1
    with pytest.raises(ValueError, match="other settings"):
        generate(tiny["sdxl"], PROMPTS, out_dir=tmp_path / "a", tuned=Tuned(negative=tuned), **make)


def test_evaluation_names_the_branch_of_each_model(tiny, tuned, tmp_path):
    result = evaluate(
        tiny["sdxl"],
        {"tuned": tuned, "both": Tuned(tuned, negative=tuned), "npo": Tuned(negative=tuned)},
        PROMPTS[:2],
        [0],
        scorers=[Brightness()],
        out_dir=tmp_path,
        sampling=Sampling(num_inference_steps=2),
    )
    gains = {model.name: model.scores["brightness"].gain.value for model in result.models}
    assert gains.keys() == {"tuned", "both", "npo"}
    assert gains["tuned"] == pytest.approx(gains["both"], abs=1e-3)
    assert abs(gains["npo"] - gains["tuned"]) > 1e-3
