"""Ranked lists of the world's renders, for objectives that compare whole lists.

    python -m diffalign.world.lists --out assets/world/pairs/lists.parquet --n 512 --images 4 --seed 0

A list is one caption and several renders of it with independent looks and defects, in the order in which they were
made, with their true rewards as scores (docs/data.md, ranked lists). Captions are of training combinations only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import DiffalignError
from diffalign.types import LONGEST_LIST
from diffalign.world.captions import TEMPLATES, caption, splits
from diffalign.world.pairs import BLOCK, REWARDS, Reward, check_target, encoded, scores_of
from diffalign.world.render import render


@dataclass(frozen=True)
class ListRecipe:
    """Which lists are made: the same recipe makes the same lists, and n lists are the first n of more.

    Raises DiffalignError for a value that there is not.
    """

    n: int
    seed: int
    images: int = 4  # of each list
    reward: Reward = "world"  # the images are the same whichever it is

    def __post_init__(self) -> None:
        if self.n < 1:
            raise DiffalignError(f"n is {self.n}; make at least one list")
        if not 2 <= self.images <= LONGEST_LIST:
            raise DiffalignError(f"images is {self.images}; a list has 2 to {LONGEST_LIST}")
        if self.reward not in REWARDS:
            raise DiffalignError(f"reward is {self.reward!r}; it must be {' or '.join(map(repr, REWARDS))}")


def list_rows(recipe: ListRecipe) -> list[dict[str, Any]]:
    """The rows of a recipe: prompt, images (PNGs) and scores (true rewards)."""
    blocks = (_block(recipe, index) for index in range(-(-recipe.n // BLOCK)))
    return [row for block in blocks for row in block][: recipe.n]


def write_lists(path: str | Path, recipe: ListRecipe, *, overwrite: bool = False) -> Path:
    """Writes the lists of a recipe to a parquet file and returns its path; `overwrite` replaces one that is there."""
    import pyarrow as pa

    from diffalign.data.formats.parquet import write_rows

    path = Path(path)
    check_target(path, "parquet", overwrite=overwrite, users=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"prompt": pa.string(), "images": pa.list_(pa.binary()), "scores": pa.list_(pa.float64())}
    write_rows(path, columns, list_rows(recipe))
    return path


def _block(recipe: ListRecipe, index: int) -> Iterator[dict[str, Any]]:
    """One block of lists."""
    rng = np.random.default_rng([recipe.seed, index, recipe.images])
    combinations = splits()["train"]
    wanted = [combinations[i] for i in rng.integers(0, len(combinations), BLOCK)]
    captions = [caption(c, k) for c, k in zip(wanted, rng.integers(0, len(TEMPLATES), BLOCK))]
    pictures = np.stack([render(wanted, rng) for _ in range(recipe.images)], axis=1)
    scores = scores_of(pictures, wanted, REWARDS[recipe.reward], None)
    for prompt, images, values in zip(captions, pictures, scores.tolist()):
        yield {"prompt": prompt, "images": [encoded(image) for image in images], "scores": values}


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m diffalign.world.lists", description="write lists of the world")
    parser.add_argument("--out", required=True, help="a .parquet file")
    parser.add_argument("--n", type=int, default=512, help="number of lists (default: %(default)s)")
    parser.add_argument("--images", type=int, default=4, help="images of each list (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reward", choices=tuple(REWARDS), default="world", help="what makes an image the better one")
    a = parser.parse_args()
    path = write_lists(a.out, ListRecipe(a.n, a.seed, a.images, a.reward))
    print(f"{a.n} lists of {a.images} images written to {path}")


if __name__ == "__main__":
    main()
