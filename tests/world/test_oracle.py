"""The true reward from pixels: right on clean textured renders, low on noise, graded where it should be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.rewards import load_scorer
from diffalign.world import oracle, render
from diffalign.world.captions import COMBINATIONS, caption
from diffalign.world.scorer import WorldAccuracy, WorldQuiet, WorldReward, WorldSize

WANTED = [c for c in COMBINATIONS for _ in range(8)]
N = len(WANTED)


def looks(**changes: float) -> render.Looks:
    """Clean looks, the same for every test, with some entries set to a constant."""
    clean = render.without_defects(render.draw_looks(N, np.random.default_rng(7)))
    return replace(clean, **{name: np.full(N, value) for name, value in changes.items()})


def read(**changes: float) -> oracle.Reading:
    return oracle.read(torch.from_numpy(render.paint(WANTED, looks(**changes), np.random.default_rng(8))))


def test_clean_renders_are_read_right() -> None:
    reading = read()
    assert oracle.accuracy(reading, WANTED).mean() >= 0.99
    vividness = torch.from_numpy(looks().vividness)
    radius = torch.from_numpy(looks().radius)
    assert (reading.vividness - vividness).abs().mean() < 0.06
    assert (reading.radius - radius).abs().mean() < 0.15
    assert reading.grain.mean() < 0.005


def test_noise_is_not_read() -> None:
    rng = np.random.default_rng(0)
    uniform = rng.integers(0, 256, (N, 16, 16, 3), dtype=np.uint8)
    normal = render.to_uint8(0.5 + 0.15 * rng.standard_normal((N, 16, 16, 3)))
    for noise in (uniform, normal):
        reading = oracle.read(torch.from_numpy(noise))
        assert oracle.accuracy(reading, WANTED).mean() < 0.03  # chance is 1/120
        assert oracle.reward(reading, WANTED).mean() < 0.2


def test_flat_images_are_read_without_nan() -> None:
    flat = torch.full((2, 16, 16, 3), 128, dtype=torch.uint8)
    reading = oracle.read(flat)
    assert oracle.reward(reading, WANTED[:2]).isfinite().all()


def test_reward_is_ordered_as_its_formula_says() -> None:
    clean = oracle.reward(read(), WANTED).mean()
    vivid = oracle.reward(read(vividness=1.0), WANTED).mean()
    grainy = oracle.reward(read(grain=0.16), WANTED).mean()
    wrong = [oracle.reward(read(redrawn=k), WANTED).mean() for k in range(3)]
    assert 1.8 < vivid < 2.0  # the ceiling is 2
    assert vivid > clean + 0.2
    assert grainy < clean - 0.2
    assert all(w < clean - 0.5 for w in wrong)


def test_reward_by_hand() -> None:
    reading = oracle.Reading(
        shape=torch.tensor([[0.9, 0.1, 0.0, 0.0]]),
        colour=torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0, 0.0]]),
        background=torch.tensor([[0.8, 0.2, 0.0, 0.0, 0.0]]),
        vividness=torch.tensor([0.7]),
        grain=torch.tensor([0.3]),
        radius=torch.tensor([4.5]),
    )
    wanted = [COMBINATIONS[0]]  # circle, red, black
    assert oracle.faithfulness(reading, wanted).item() == pytest.approx(0.36)
    assert oracle.reward(reading, wanted).item() == pytest.approx(0.36 + 0.7 - 1.0)
    assert oracle.size_reward(reading, wanted).item() == pytest.approx(0.36 + 0.5)
    for taste in (1.0, -1.0, 0.5):
        mine = oracle.taste_reward(reading, wanted, torch.tensor([taste]))
        assert mine.item() == pytest.approx(0.36 + taste * (0.7 + 0.5 - 1) - 1.0)


def test_the_second_taste_is_another_one() -> None:
    small, large = read(radius=3.8), read(radius=5.2)
    assert (oracle.size_reward(large, WANTED) - oracle.size_reward(small, WANTED)).mean() > 0.5
    assert (oracle.reward(large, WANTED) - oracle.reward(small, WANTED)).mean().abs() < 0.2


@pytest.mark.parametrize(
    ("name", "kind"),
    [("world", WorldReward), ("world-size", WorldSize), ("world-accuracy", WorldAccuracy), ("world-quiet", WorldQuiet)],
)
def test_scorers_score_single_images_as_they_score_batches(name: str, kind: type) -> None:
    pictures = [Image.fromarray(x) for x in render.render(WANTED[::90], np.random.default_rng(0))]
    texts = [caption(c, k % 4) for k, c in enumerate(WANTED[::90])]
    scorer = load_scorer(name)
    assert isinstance(scorer, kind)
    together = scorer.score(pictures, texts)
    assert together.dtype == torch.float32
    assert together.shape == (len(texts),)
    alone = torch.cat([scorer.score([p], [t]) for p, t in zip(pictures, texts)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_scorers_refuse_what_they_cannot_read() -> None:
    picture, text = Image.new("RGB", (16, 16)), caption(COMBINATIONS[0])
    with pytest.raises(ValueError, match="not a caption of the embedded world"):
        WorldReward().score([picture], ["a photo of a dog"])
    with pytest.raises(ValueError, match="1 images but 2 prompts"):
        WorldReward().score([picture], [text, text])
    with pytest.raises(ValueError, match="image 0 is 32x32"):
        WorldReward().score([picture.resize((32, 32))], [text])
