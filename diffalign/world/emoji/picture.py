"""An image sheet of a base of the emoji world, one row a caption.

python -m diffalign.world.emoji.picture --out assets/emoji/samples.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from diffalign.world.emoji import base_path
from diffalign.world.emoji.captions import prompts
from diffalign.world.emoji.render import SIZE
from diffalign.world.sample import sample_pixels, with_seeds

COLUMNS = 4  # images of a caption
BLOCKS = 2  # of captions, side by side
TEXT_WIDTH = 220  # pixels, for the captions


def draw(base: Path, captions: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """`columns` images of each caption, made by the pipeline at `base` (20 DDIM steps, guidance 5)."""
    texts, seeds = with_seeds(list(captions), columns)
    return sheet(captions, sample_pixels(StableDiffusionXLPipeline.from_pretrained(base), texts, seeds))


def sheet(captions: Sequence[str], images: Tensor) -> Image.Image:
    """Images uint8 "n 64 64 3", grouped by caption, one row a caption, in two blocks side by side."""
    columns, rows, side = len(images) // len(captions), -(-len(captions) // BLOCKS), SIZE + 2
    width = TEXT_WIDTH + columns * side
    whole = Image.new("RGB", (BLOCKS * width, rows * side), "white")
    pen = ImageDraw.Draw(whole)
    for i, text in enumerate(captions):
        left, top = i // rows * width, i % rows * side
        pen.text((left + 8, top + SIZE // 2 - 6), text, fill="black")
        for j in range(columns):
            whole.paste(Image.fromarray(images[i * columns + j].numpy()), (left + TEXT_WIDTH + j * side, top))
    return whole


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m diffalign.world.emoji.picture", description="draw a base's images")
    parser.add_argument("--out", required=True, type=Path, help="a .png file")
    parser.add_argument("--base", type=Path, help="a pipeline folder; the committed base by default")
    arguments = parser.parse_args()
    draw(arguments.base or base_path(), prompts("heldout")).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
