"""The committed base: plain diffusers loads it, the package does, its images are recognised, and the recipe runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from diffalign.models.loading.base import load_base
from diffalign.world.emoji import asset, base_model, base_path, reward
from diffalign.world.emoji.base_model import Phase
from diffalign.world.emoji.captions import parse, prompts, vocabulary
from diffalign.world.emoji.vae import fitted_vae, to_latents, training_pixels
from diffalign.world.sample import sample_pixels, with_seeds


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(base_path())


def test_a_process_that_imports_only_diffusers_loads_and_runs_it(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from diffusers import StableDiffusionXLPipeline\n"
        f"pipe = StableDiffusionXLPipeline.from_pretrained({str(base_path())!r})\n"
        "images = pipe(['a glossy cat on a blue background'], num_inference_steps=2).images\n"
        "assert [i.size for i in images] == [(64, 64)]\n"
        "assert not [m for m in sys.modules if m.startswith('diffalign')]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_package_loads_it(pipe: StableDiffusionXLPipeline) -> None:
    base = load_base(str(base_path()))
    assert pipe.unet.config.addition_embed_type == "text_time"
    assert (pipe.scheduler.config.beta_start, pipe.scheduler.config.beta_end) == (0.00085, 0.012)
    assert sum(p.numel() for p in base.unet.parameters()) == sum(p.numel() for p in pipe.unet.parameters())


@pytest.mark.slow
def test_its_autoencoder_is_what_the_fit_gives(pipe: StableDiffusionXLPipeline) -> None:
    pixels = training_pixels(8, seed=6)
    assert torch.allclose(to_latents(fitted_vae(), pixels), to_latents(pipe.vae, pixels), atol=1e-3)


def test_its_images_are_recognised(pipe: StableDiffusionXLPipeline) -> None:
    texts, seeds = with_seeds(prompts("heldout"), 1)
    reading = reward.read(sample_pixels(pipe, texts, seeds))
    recorded = json.loads((base_path() / "RECIPE.json").read_text())["heldout, 24 combinations x 8 seeds"]
    assert recorded["thing"] >= 0.9
    wanted = [parse(t) for t in texts]
    assert reward.accuracy(reading, wanted).mean() > recorded["accuracy"] - 0.2  # 24 images: twice the standard error


def test_every_word_is_one_token() -> None:
    words = base_model.tokenizer()
    assert all(len(words(w)["input_ids"]) == 3 for w in vocabulary())
    longest = max(len(words(f"{p.split()[0]} classic {p}")["input_ids"]) for p in prompts("heldout"))
    assert longest <= words.model_max_length == base_model.TOKENS


@pytest.mark.slow
def test_the_recipe_is_deterministic_and_learns() -> None:
    recipe = base_model.Recipe(phases=(Phase(1, ((0, 1.0),)), Phase(1, ((0, 1.0), (2, 0.0)), 0.5, 0.1)), batch=2)
    made = [base_model.pipeline(recipe.seed) for _ in range(2)]
    start = {k: v.clone() for k, v in made[0].unet.state_dict().items()}
    for one in made:
        base_model.train(one, recipe)
    first, again = (one.unet.state_dict() for one in made)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], start[k]) for k in first)


def test_everything_is_under_20_mb_and_licensed() -> None:
    folder = asset("art.png").parent
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 20_000_000
    licences = (folder / "LICENSES.md").read_text()
    for words in (
        *("Noto Emoji", "Apache License", "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION"),
        *("Twemoji", "https://creativecommons.org/licenses/by/4.0/", "changes"),
        *("Fluent Emoji", "MIT License", "Copyright (c) Microsoft Corporation"),
    ):
        assert words in licences, words
