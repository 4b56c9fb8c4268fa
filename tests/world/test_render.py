"""Renders: the same seed gives the same bytes, coverage has the area of the shape, texture has the stated size."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from diffalign.world import render as r
from diffalign.world.captions import COMBINATIONS


def test_same_seed_same_bytes() -> None:
    first, again, other = (r.render(COMBINATIONS, np.random.default_rng(s)) for s in (3, 3, 4))
    assert first.shape == (120, 16, 16, 3)
    assert first.dtype == np.uint8
    assert hashlib.sha256(first.tobytes()).digest() == hashlib.sha256(again.tobytes()).digest()
    assert (first != other).mean() > 0.9


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        (0, np.pi),
        (1, 1.68**2),
        (2, 0.5 * 1.72 * (2 * 1.72 / 1.75)),
        (3, 2 * (2 * 0.6) - 0.6**2),
    ],
)
def test_coverage_is_the_area_of_the_shape(shape: int, area: float) -> None:
    """Areas in units of the squared radius, worked out by hand."""
    rng = np.random.default_rng(0)
    n = 200
    radius = rng.uniform(*r.RADIUS, n)
    covered = r.masks(np.full(n, shape), radius, rng.uniform(-1.5, 1.5, (n, 2))).sum((1, 2))
    assert np.mean(covered / radius**2) == pytest.approx(area, rel=0.01)


def test_texture_has_its_stated_std() -> None:
    texture = r.texture(500, np.random.default_rng(0))
    assert texture.std() == pytest.approx(np.hypot(r.GRAIN_FLOOR, r.SMOOTH_FLOOR), rel=0.02)
    smooth = texture.reshape(500, 8, 2, 8, 2, 3).mean((2, 4))  # grain averages out, the smooth field hardly
    assert smooth.std() > 0.9 * np.hypot(r.GRAIN_FLOOR / 2, r.SMOOTH_FLOOR)


def test_defects_come_at_their_rates() -> None:
    looks = r.draw_looks(20_000, np.random.default_rng(0))
    assert (looks.redrawn >= 0).mean() == pytest.approx(r.REDRAWN_RATE, abs=0.01)
    assert (looks.grain > 0).mean() == pytest.approx(r.GRAIN_RATE, abs=0.01)
    assert looks.blurred.mean() == pytest.approx(r.BLUR_RATE, abs=0.01)
    clean = r.without_defects(looks)
    assert not clean.blurred.any()
    assert not clean.grain.any()
    assert (clean.redrawn == -1).all()
    assert (clean.vividness == looks.vividness).all()
