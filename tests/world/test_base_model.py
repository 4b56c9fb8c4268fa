"""The committed base: plain diffusers loads it, it is as accurate as its recipe states, and the recipe runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from diffalign import world
from diffalign.world import base_model, fairness, oracle
from diffalign.world.captions import parse, prompts, vocabulary
from diffalign.world.pairs import PairRecipe, make_pairs
from diffalign.world.sample import sample_pixels, with_seeds


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(world.base_path())


def test_a_process_that_imports_only_diffusers_loads_and_runs_it(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from diffusers import StableDiffusionXLPipeline\n"
        f"pipe = StableDiffusionXLPipeline.from_pretrained({str(world.base_path())!r})\n"
        "texts = ['a red circle on a black background', 'a blue cross on a white background']\n"
        "images = pipe(texts, num_inference_steps=4, generator=torch.manual_seed(0)).images\n"
        "assert [i.size for i in images] == [(16, 16)] * 2\n"
        f"pipe.save_pretrained({str(tmp_path)!r})\n"
        f"again = StableDiffusionXLPipeline.from_pretrained({str(tmp_path)!r})\n"
        "more = again(texts, num_inference_steps=4, generator=torch.manual_seed(0)).images\n"
        "assert all(a.tobytes() == b.tobytes() for a, b in zip(images, more))\n"
        "assert not [m for m in sys.modules if m.startswith('diffalign')]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_it_has_the_parts_of_sdxl(pipe: StableDiffusionXLPipeline) -> None:
    assert pipe.unet.config.addition_embed_type == "text_time"
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert (pipe.scheduler.config.beta_start, pipe.scheduler.config.beta_end) == (0.00085, 0.012)
    size = sum(f.stat().st_size for f in world.base_path().rglob("*") if f.is_file())
    assert size < 3_500_000


def test_it_is_as_good_as_its_recipe_says(pipe: StableDiffusionXLPipeline) -> None:
    texts, seeds = with_seeds(prompts("heldout"), 4)
    reading = oracle.read(sample_pixels(pipe, texts, seeds))
    accuracy = oracle.accuracy(reading, [parse(t) for t in texts]).mean()
    recipe = json.loads((world.base_path() / "RECIPE.json").read_text())
    recorded = recipe["heldout, 24 combinations x 12 seeds, 20 DDIM steps"]["accuracy at guidance 5.0"]
    assert recorded >= 0.9
    assert accuracy > recorded - 0.06


def test_an_image_depends_on_its_prompt_and_seed_alone(pipe: StableDiffusionXLPipeline) -> None:
    texts = prompts("heldout")[:5]
    together = sample_pixels(pipe, texts, [0, 1, 2, 3, 4])
    alone = sample_pixels(pipe, texts[3:4], [3])
    assert (together[3:4].int() - alone.int()).abs().max() <= 1  # the last bit may round otherwise


def test_every_word_is_one_token() -> None:
    words = base_model.tokenizer()
    assert all(len(words(w)["input_ids"]) == 3 for w in vocabulary())
    assert len(words("zebra, 7!")["input_ids"]) > 3  # other text is spelled out, not lost
    longest = max(words(p)["input_ids"].__len__() for s in world.splits() for p in prompts(s, 4))
    assert longest <= words.model_max_length == base_model.TOKENS


def test_the_recipe_is_deterministic_and_learns() -> None:
    recipe = base_model.Recipe(phases=(base_model.Phase(steps=4, learning_rate=1e-3),), batch=8)
    made = [base_model.pipeline(recipe.seed) for _ in range(2)]
    before = made[0].unet.conv_out.weight.detach().clone()
    for pipe in made:
        base_model.train(pipe, recipe)
    first, second = (p.unet.state_dict() for p in made)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(before, first["conv_out.weight"])


def test_inverted_noise_is_what_texture_predicts(pipe: StableDiffusionXLPipeline) -> None:
    """Against the closed form of `fairness.texture_std`, which knows nothing of the network."""
    quarters = fairness.measure(pipe, make_pairs(PairRecipe(n=16, seed=1)), stride=50)
    for q in quarters[1:]:
        for side in q.noise_std:
            assert side == pytest.approx(q.texture_std, abs=0.08)
