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

COLUMNS = 8
TEXT_WIDTH = 220  # pixels, for the captions


def draw(base: Path, captions: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """`columns` images of each caption, made by the pipeline at `base` (20 DDIM steps, guidance 5)."""
    texts, seeds = with_seeds(list(captions), columns)
    return sheet(captions, sample_pixels(StableDiffusionXLPipeline.from_pretrained(base), texts, seeds))


def sheet(captions: Sequence[str], images: Tensor) -> Image.Image:
    """Images uint8 "n 64 64 3", grouped by caption, one row a caption."""
    columns, side = len(images) // len(captions), SIZE + 2
    whole = Image.new("RGB", (TEXT_WIDTH + columns * side, len(captions) * side), "white")
    pen = ImageDraw.Draw(whole)
    for i, text in enumerate(captions):
        pen.text((6, i * side + SIZE // 2 - 6), text, fill="black")
        for j in range(columns):
            whole.paste(Image.fromarray(images[i * columns + j].numpy()), (TEXT_WIDTH + j * side, i * side))
    return whole


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m diffalign.world.emoji.picture", description="draw a base's images")
    parser.add_argument("--out", required=True, type=Path, help="a .png file")
    parser.add_argument("--base", type=Path, help="a pipeline folder; the committed base by default")
    parser.add_argument("--rows", type=int, default=12, help="number of held-out captions")
    arguments = parser.parse_args()
    draw(arguments.base or base_path(), prompts("heldout")[: arguments.rows]).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
