from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, clip_pixels, crop, pad


@pytest.mark.parametrize("fit", [crop, pad])
def test_constant_image_has_the_closed_form(fit):
    colour = (51, 102, 204)
    pixels = clip_pixels([Image.new("RGB", (48, 48), colour)], 32, fit)
    assert pixels.shape == (1, 3, 32, 32)
    for channel in range(3):
        expected = (colour[channel] / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
        torch.testing.assert_close(pixels[0, channel], torch.full((32, 32), expected))


def test_crop_agrees_with_transformers_image_processor(processor, pictures):
    theirs = processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(clip_pixels(pictures, 32, crop), theirs, atol=1e-5, rtol=0)


def test_pad_keeps_the_whole_image_and_fills_with_black():
    fitted = np.asarray(pad(Image.new("RGB", (64, 32), (255, 255, 255)), 16))  # 64 x 32 becomes 16 x 8
    assert (fitted[4:12] == 255).all()
    assert (fitted[:4] == 0).all()
    assert (fitted[12:] == 0).all()


def test_pad_upscales_small_images():
    assert np.asarray(pad(Image.new("RGB", (8, 8), (9, 9, 9)), 32)).min() == 9


def test_grey_images_become_rgb():
    assert clip_pixels([Image.new("L", (10, 20), 128)], 8, crop).shape == (1, 3, 8, 8)
