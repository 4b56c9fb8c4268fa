"""Renders: the same from the same seed, and as their looks say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffalign.world.emoji.art import CELL, drawings
from diffalign.world.emoji.captions import BACKGROUNDS, STYLES, THINGS, Combination, combinations
from diffalign.world.emoji.render import BACKGROUND, SIZE, TINT, draw_looks, paint, render

KNOWN = combinations("train")


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, again, other = (render(KNOWN[:16], np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == (16, SIZE, SIZE, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_every_thing_has_three_different_drawings() -> None:
    art = drawings()
    assert [len(row) for row in art] == [len(STYLES)] * len(THINGS)
    seen = {drawing.tobytes() for row in art for drawing in row}
    assert len(seen) == len(THINGS) * len(STYLES)
    for row in art:
        for drawing in row:
            left, top, right, bottom = drawing.getbbox() or (0, 0, 0, 0)
            assert max(right - left, bottom - top) >= CELL - 1


def test_corners_have_the_background_and_the_drawing_is_elsewhere() -> None:
    wanted = [Combination("cat", b) for b in BACKGROUNDS]
    looks = draw_looks(wanted, np.random.default_rng(0))
    images = paint(wanted, replace(looks, extent=np.full(8, 50), offset=0 * looks.offset, blur=0 * looks.blur))
    for image, name in zip(images, BACKGROUNDS):
        assert (abs(image[0, 0].astype(int) - BACKGROUND[name]) <= TINT + 1).all()
        assert (image[:7] == image[0, 0]).all()
        assert (image[8:-8, 8:-8] != image[0, 0]).any(-1).mean() > 0.4


def test_a_named_style_is_the_style() -> None:
    wanted = [c._replace(style="flat") for c in KNOWN[:40]]
    assert (draw_looks(wanted, np.random.default_rng(0)).style == STYLES.index("flat")).all()
    open_styles = draw_looks(KNOWN[:40], np.random.default_rng(0)).style
    assert set(open_styles) == {0, 1, 2}


@pytest.mark.parametrize(("vividness", "chroma"), [(0.0, 0.0), (1.0, 0.6)])
def test_vividness_is_the_colour_of_the_drawing(vividness: float, chroma: float) -> None:
    wanted = [Combination("carrot", "grey")]
    looks = draw_looks(wanted, np.random.default_rng(0))
    looks = replace(looks, vividness=np.array([vividness]), blur=np.array([0]), tint=np.zeros((1, 3)))
    centre = paint(wanted, looks)[0, 24:40, 24:40].astype(int)
    assert (centre.max(-1) - centre.min(-1)).max() >= 255 * chroma
    assert (centre.max(-1) - centre.min(-1)).max() <= 255 * chroma + 90


def test_blur_lowers_contrast_and_leaves_the_background() -> None:
    wanted = [Combination("rocket", "white")]
    looks = replace(draw_looks(wanted, np.random.default_rng(0)), extent=np.array([44]))
    sharp, blurred = (paint(wanted, replace(looks, blur=np.array([k])))[0].astype(int) for k in (0, 6))
    assert abs(np.diff(blurred, axis=1)).max() < 0.6 * abs(np.diff(sharp, axis=1)).max()
    assert (sharp[0, 0] == blurred[0, 0]).all()
