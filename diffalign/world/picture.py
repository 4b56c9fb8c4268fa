"""An image of the world: renders above, samples of the committed base below, captions beside them.

python -m diffalign.world.picture --out assets/world/samples.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionXLPipeline
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from diffalign.world import base_path
from diffalign.world.captions import parse, prompts
from diffalign.world.render import SIZE, render
from diffalign.world.sample import sample_pixels, with_seeds

COLUMNS = 8
ZOOM = 4
TEXT_WIDTH = 330  # pixels, for the captions
HEADING = 22  # pixels


def draw(base: Path, rows: int = 6) -> Image.Image:
    """`rows` held-out captions, eight renders of each, then eight samples of the pipeline at `base` of each."""
    every = prompts("heldout")
    texts = [every[i] for i in np.linspace(0, len(every) - 1, rows).astype(int)]
    many, seeds = with_seeds(texts, COLUMNS)
    renders = render([parse(t) for t in many], np.random.default_rng(0))
    samples = sample_pixels(StableDiffusionXLPipeline.from_pretrained(base), many, seeds).numpy()
    parts = [
        _part("renders, defects included; training pictures look like these", texts, renders),
        _part("samples of the base, 20 DDIM steps, guidance 5, held-out captions", texts, samples),
    ]
    whole = Image.new("RGB", (parts[0].width, sum(p.height for p in parts)), "white")
    whole.paste(parts[0], (0, 0))
    whole.paste(parts[1], (0, parts[0].height))
    return whole


def _part(heading: str, texts: list[str], pictures: NDArray[np.uint8]) -> Image.Image:
    side = SIZE * ZOOM
    part = Image.new("RGB", (TEXT_WIDTH + COLUMNS * (side + 2), HEADING + len(texts) * (side + 2)), "white")
    pen = ImageDraw.Draw(part)
    pen.text((6, 5), heading, fill="black")
    for i, text in enumerate(texts):
        top = HEADING + i * (side + 2)
        pen.text((6, top + side // 2 - 6), text, fill="black")
        for j in range(COLUMNS):
            picture = Image.fromarray(pictures[i * COLUMNS + j]).resize((side, side), Image.Resampling.NEAREST)
            part.paste(picture, (TEXT_WIDTH + j * (side + 2), top))
    return part


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m diffalign.world.picture", description="draw the world")
    parser.add_argument("--out", required=True, type=Path, help="a .png file")
    arguments = parser.parse_args()
    draw(base_path()).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
