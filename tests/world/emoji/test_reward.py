"""The reward: every part of it follows what was drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.rewards import load_scorer
from diffalign.world.emoji import reward
from diffalign.world.emoji.captions import BACKGROUNDS, STYLES, caption, combinations
from diffalign.world.emoji.render import EXTENT, Looks, draw_looks, paint

WANTED = [c._replace(style=STYLES[i % 3]) for i, c in enumerate(combinations("heldout") * 5)]


@pytest.fixture(scope="module")
def looks() -> Looks:
    return draw_looks(WANTED, np.random.default_rng(11))


def read(looks: Looks) -> reward.Reading:
    return reward.read(torch.from_numpy(paint(WANTED, looks)))


def clean(looks: Looks) -> Looks:
    return replace(looks, blur=0 * looks.blur, vividness=np.ones_like(looks.vividness))


def test_renders_are_faithful(looks: Looks) -> None:
    reading = read(looks)
    assert reward.accuracy(reading, WANTED).mean() >= 0.98
    assert reward.faithfulness(reading, WANTED).mean() >= 0.97
    background = reading.background.argmax(1)
    assert (background == torch.tensor([BACKGROUNDS.index(c.background) for c in WANTED])).float().mean() >= 0.99


def test_a_wrong_thing_background_or_style_is_unfaithful(looks: Looks) -> None:
    reading = read(clean(looks))
    for wrong in (
        [c._replace(thing="cat" if c.thing != "cat" else "pig") for c in WANTED],
        [c._replace(background="pink" if c.background != "pink" else "blue") for c in WANTED],
        [c._replace(style="flat" if c.style != "flat" else "glossy") for c in WANTED],
    ):
        assert reward.faithfulness(reading, wrong).mean() < 0.02
        assert reward.accuracy(reading, wrong).mean() < 0.02
    unnamed = [c._replace(style=None) for c in WANTED]
    assert reward.faithfulness(reading, unnamed).mean() >= 0.98


@pytest.mark.parametrize("vividness", [0.3, 0.6, 1.0])
def test_vividness_is_read(looks: Looks, vividness: float) -> None:
    reading = read(replace(clean(looks), vividness=np.full(len(WANTED), vividness)))
    assert reading.vividness.median() == pytest.approx(vividness, abs=0.06)


def test_a_colour_that_the_art_lacks_is_not_vivid(looks: Looks) -> None:
    """Oversaturation and a colour cast raise the chroma of pale drawings; of vivid ones neither is worth anything."""
    images = torch.from_numpy(paint(WANTED, clean(looks))).float()
    vivid = reward.read(images.to(torch.uint8)).vividness
    assert vivid.max() <= 1
    for cast in ([60, 0, -60], [-60, 0, 60]):
        assert (
            reward.read((images + torch.tensor(cast)).clamp(0, 255).to(torch.uint8)).vividness - vivid
        ).mean() < -0.05


def test_sharpness_falls_with_every_pass_of_blur(looks: Looks) -> None:
    means = [read(replace(looks, blur=np.full(len(WANTED), k))).sharpness.mean().item() for k in (0, 1, 3, 6)]
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.95
    assert means[-1] < 0.1


def test_size_is_read_within_two_pixels(looks: Looks) -> None:
    reading = read(clean(looks))
    drawn = (torch.from_numpy(looks.extent) - EXTENT[0]) / (EXTENT[1] - EXTENT[0])
    assert ((reading.size - drawn).abs() <= 2 / (EXTENT[1] - EXTENT[0])).float().mean() >= 0.95


def test_an_uneven_background_costs(looks: Looks) -> None:
    images = torch.from_numpy(paint(WANTED, looks))
    grain = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 15
    rough = reward.read((images + grain).clamp(0, 255).to(torch.uint8))
    assert read(looks).unevenness.mean() < 0.003
    assert rough.unevenness.mean() == pytest.approx(15 / 255, rel=0.25)


def test_noise_earns_nothing() -> None:
    noise = torch.randint(0, 256, (32, 64, 64, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert reward.reward(reward.read(noise), WANTED[:32]).mean() < 0.1


def test_a_taste_adds_the_share_of_its_style(looks: Looks) -> None:
    reading, wanted = read(clean(looks)), [c._replace(style=None) for c in WANTED]
    for k, style in enumerate(STYLES):
        gain = reward.taste_reward(reading, wanted, style) - reward.reward(reading, wanted)
        assert ((gain > reward.TASTE / 2) == torch.from_numpy(looks.style == k)).float().mean() >= 0.99


def test_scorers_read_images_and_captions(looks: Looks) -> None:
    reading = read(looks)
    images = [Image.fromarray(image) for image in paint(WANTED, looks)[:6]]
    texts = [caption(c) for c in WANTED[:6]]
    for name, expected in (
        ("emoji", reward.reward(reading, WANTED)),
        ("emoji-size", reward.size_reward(reading, WANTED)),
        ("emoji-accuracy", reward.accuracy(reading, WANTED)),
        ("emoji-glossy", reading.style[:, 2]),
        ("emoji-taste-glossy", reward.taste_reward(reading, WANTED, "glossy")),
    ):
        torch.testing.assert_close(load_scorer(name).score(images, texts), expected[:6], atol=1e-5, rtol=0)
    with pytest.raises(DiffalignError, match="image 0 is 16x16; images of the emoji world are 64x64"):
        load_scorer("emoji").score([Image.new("RGB", (16, 16))], texts[:1])
    with pytest.raises(DiffalignError, match="6 images but 1 prompts"):
        load_scorer("emoji-flat").score(images, texts[:1])
    with pytest.raises(DiffalignError, match="no images"):
        load_scorer("emoji").score([], [])


def test_other_tensors_are_refused() -> None:
    with pytest.raises(DiffalignError, match=r"shape \[n, 64, 64, 3\]; these are torch.float32 \[1, 64, 64, 3\]"):
        reward.read(torch.zeros(1, 64, 64, 3))
