from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from diffalign.evaluation.grid import comparison_grid, fit, wrap


def test_small_images_are_enlarged_by_whole_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    big = np.asarray(fit(Image.fromarray(pixels), 160))
    assert (big == pixels.repeat(10, 0).repeat(10, 1)).all()
    assert fit(Image.new("RGB", (70, 50)), 160).size == (140, 100)
    assert fit(Image.new("RGB", (1024, 512)), 384).size == (384, 192)


def test_every_image_is_where_its_row_and_column_are():
    colours = {"base": [(255, 0, 0), (0, 255, 0)], "dpo": [(0, 0, 255), (255, 255, 0)]}
    columns = {name: [Image.new("RGB", (16, 16), c) for c in some] for name, some in colours.items()}
    grid = np.asarray(comparison_grid(["first", "second"], columns, cell=32))
    centres = {}
    for name, some in colours.items():
        for row, colour in enumerate(some):
            y, x = np.nonzero((grid == colour).all(2))
            assert len(y) == 32 * 32
            centres[name, row] = (y.mean(), x.mean())
    assert centres["base", 0][0] == centres["dpo", 0][0] < centres["base", 1][0] == centres["dpo", 1][0]
    assert centres["base", 0][1] == centres["base", 1][1] < centres["dpo", 0][1] == centres["dpo", 1][1]
    left = round(centres["base", 0][1]) - 16
    assert (grid[:, :left] < 128).any()  # the prompts are drawn


def test_wrapped_text_fits_and_loses_nothing():
    font = ImageFont.load_default(15)
    text = "a small red fox under an extraordinarily-long-hyphenated-word-that-fits-in-no-column in the snow"
    lines = wrap(text, font, 120)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_columns_must_be_as_long_as_the_prompts():
    with pytest.raises(ValueError, match="column 'dpo' has 1 images for 2 prompts"):
        comparison_grid(["a", "b"], {"dpo": [Image.new("RGB", (8, 8))]})
