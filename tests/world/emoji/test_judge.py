"""The judge names thing and style of renders that its training left out, and refuses what is none of them."""

from __future__ import annotations

import json

import numpy as np
import torch

from diffalign.world.emoji import asset
from diffalign.world.emoji.captions import SPLITS, combinations
from diffalign.world.emoji.judge import NOTHING, Judge, Recipe, accuracy, judge, train
from diffalign.world.emoji.render import render
from diffalign.world.emoji.vae import fitted_vae, to_latents, to_pixels


def test_it_names_99_percent_of_renders() -> None:
    """Of all combinations together, by the recorded figures; of the development ones, measured again here."""
    figures = accuracy(judge(), "heldout", 480)
    assert min(figures.values()) >= 0.985  # 480 renders: one standard error below
    recorded = json.loads((asset("judge") / "RECIPE.json").read_text())["accuracy on 4,800 renders of each split"]
    sizes = {split: len(combinations(split)) for split in SPLITS}
    for name in ("thing", "style"):
        assert sum(sizes[s] * recorded[s][name] for s in SPLITS) / sum(sizes.values()) >= 0.99
        assert min(recorded[s][name] for s in SPLITS) >= 0.98  # the white-bellied penguin on white is in `final`


def test_it_names_them_after_the_autoencoder_too() -> None:
    wanted = [c._replace(style="flat") for c in combinations("heldout")] * 4
    vae = fitted_vae()
    pixels = vae.decode(to_latents(vae, to_pixels(render(wanted, np.random.default_rng(4))))).sample.clamp(-1, 1)
    things, styles = judge()(pixels)
    assert (styles.argmax(1) == 1).float().mean() >= 0.97
    assert (things.argmax(1) == torch.arange(24).repeat(4)).float().mean() >= 0.97


def test_images_of_nothing_are_nothing() -> None:
    noise = torch.rand(32, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = (torch.rand(32, 3, 1, 1, generator=torch.Generator().manual_seed(1)) * 2 - 1).expand(-1, -1, 64, 64)
    for pixels in (noise, plain):
        assert (judge()(pixels)[0].argmax(1) == NOTHING).float().mean() >= 0.95


def test_its_training_is_deterministic_and_learns() -> None:
    first, again = (train(Recipe(steps=3, batch=8)).state_dict() for _ in range(2))
    torch.manual_seed(Recipe.seed)
    untrained = Judge().state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], untrained[k]) for k in first)
