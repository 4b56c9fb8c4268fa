from __future__ import annotations

from math import pi, sin, sqrt

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.evaluation.guards import look, mean_distance, pixel_features


def flat(*colour: int, size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def test_spread_of_constant_images_is_their_distance():
    black, white, red = pixel_features([flat(0, 0, 0), flat(255, 255, 255), flat(255, 0, 0)])
    assert mean_distance(torch.stack([black, white])) == pytest.approx(1)
    assert mean_distance(torch.stack([black, red])) == pytest.approx(sqrt(1 / 3))
    assert mean_distance(torch.stack([black, white, red])) == pytest.approx((1 + sqrt(1 / 3) + sqrt(2 / 3)) / 3)
    assert mean_distance(torch.stack([red, red])) == 0
    assert mean_distance(red[None]) == 0


def test_spread_sees_layout_not_size_or_grain():
    large = pixel_features([flat(0, 0, 0, size=200), flat(255, 255, 255, size=200)])
    assert mean_distance(large) == pytest.approx(1)
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)) for _ in range(2)]
    assert mean_distance(pixel_features(noise)) == pytest.approx(sqrt(1 / 6) / 8, rel=0.05)  # mean of 8 x 8: sd / 8


def test_spread_of_unit_vectors_is_the_chord():
    angles = torch.tensor([0.0, pi / 3, pi / 2])
    expected = (2 * sin(pi / 6) + 2 * sin(pi / 4) + 2 * sin(pi / 12)) / 3
    assert mean_distance(torch.stack([angles.cos(), angles.sin()], 1)) == pytest.approx(expected, abs=1e-6)


def test_look_of_known_images():
    saturation, sharpness, brightness = look([flat(128, 128, 128)])[0].tolist()
    assert (saturation, sharpness) == (0, 0)
    assert brightness == pytest.approx(128 / 255, abs=1e-6)
    assert look([flat(255, 0, 0), flat(0, 0, 0)])[:, 0].tolist() == [1, 0]
    stripes = np.zeros((10, 10, 3), np.uint8)
    stripes[:, ::2] = 255
    assert look([Image.fromarray(stripes)])[0, 1] == pytest.approx(0.5, abs=1e-6)  # 1 across, 0 along
