"""The README's picture: prompts of the emoji world beside images of the base and of tuned models, on the same noise.

    python benchmarks/emoji_picture.py --out assets/demo/grid.png --column base=runs/emoji/eval/images/base-1a2b3c4d \
        --column "DPO=runs/emoji/eval/images/dpo-5e6f7a8b"

A column is a folder of images that `diffalign evaluate` leaves in OUT/images. Rows are the held-out captions of six
things that differ in colour and form, all with the same seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from diffalign.evaluation.grid import comparison_grid
from diffalign.world.emoji.captions import parse, prompts

THINGS = ("strawberry", "pizza", "doughnut", "octopus", "cat", "rocket")
SIDE = 128  # pixels of an image of 64, enlarged smoothly


def draw(columns: dict[str, Path], seed: int) -> Image.Image:
    """The grid; columns by their heading."""
    captions = prompts("heldout")
    rows = [row for row, text in enumerate(captions) if parse(text).thing in THINGS]

    def image(folder: Path, row: int) -> Image.Image:
        with Image.open(folder / f"{row:05d}_{seed}.png") as found:
            return found.resize((SIDE, SIDE), Image.Resampling.LANCZOS)

    cells = {heading: [image(folder, row) for row in rows] for heading, folder in columns.items()}
    return comparison_grid([captions[row] for row in rows], cells, cell=SIDE)


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="a .png file")
    parser.add_argument("--column", action="append", required=True, metavar="HEADING=FOLDER", help="left to right")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    columns = dict(column.split("=", 1) for column in a.column)
    draw({heading: Path(folder) for heading, folder in columns.items()}, a.seed).save(a.out, optimize=True)


if __name__ == "__main__":
    main()
