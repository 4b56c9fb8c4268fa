"""Preference pairs of the world, labelled by the true reward, in the layouts that users' data come in.

    python -m diffalign.world.pairs --out assets/world/pairs/renders.parquet --n 1024 --seed 0

Captions are of training combinations only. With `users` each pair is somebody's, by their taste, and their embeddings
are written beside the pairs (`users.py`). Sources:
    renders   two renders of one caption with independent looks and defects
    samples   the best and the worst of four images that the base makes of one caption
Which side is shown first is drawn at random, so nothing but the label tells the chosen one.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError, ExistingFileError
from diffalign.io.files import written_whole
from diffalign.world import base_path, oracle
from diffalign.world.captions import TEMPLATES, Combination, caption, splits
from diffalign.world.render import render
from diffalign.world.users import User, world_users, write_users

Source = Literal["renders", "samples"]
Reward = Literal["world", "world-size"]  # scorers of the world
Layout = Literal["parquet", "folder"]

BLOCK = 128  # pairs made at once; each block has its own generator, so the first n pairs do not depend on n
BEST_OF = 4
PAIRS_PER_GROUP = 128  # rows of a parquet row group, which readers hold in memory whole: at most 3 MB here

RewardOf = Callable[[oracle.Reading, Sequence[Combination]], Tensor]
REWARDS: dict[str, RewardOf] = {"world": oracle.reward, "world-size": oracle.size_reward}


@dataclass(frozen=True)
class Pair:
    """One comparison; side 0 and 1 in the order in which they are shown."""

    caption: str
    pictures: tuple[NDArray[np.uint8], NDArray[np.uint8]]  # height width 3
    scores: tuple[float, float]  # true rewards
    first_is_better: bool  # the label; contradicts the scores only where labels were shuffled
    name: str
    user: str | None = None  # whose label it is, where there are users


@dataclass(frozen=True)
class PairRecipe:
    """Which pairs are made: the same recipe makes the same pairs, and n pairs are the first n of more.

    Raises DiffalignError for a value that there is not, and for users with a reward of their own.
    """

    n: int
    seed: int
    source: Source = "renders"
    reward: Reward = "world"  # decides which image is better; of renders the images are the same whichever it is
    shuffle_labels: bool = False  # the labels are dealt out again at random: a control that must gain nothing
    users: int = 0  # each pair is labelled by one of so many, drawn at random; renders are the same images without

    def __post_init__(self) -> None:
        if self.n < 1:
            raise DiffalignError(f"n is {self.n}; make at least one pair")
        if self.source not in ("renders", "samples"):
            raise DiffalignError(f"source is {self.source!r}; it must be 'renders' or 'samples'")
        if self.reward not in REWARDS:
            raise DiffalignError(f"reward is {self.reward!r}; it must be {' or '.join(map(repr, REWARDS))}")
        if self.users and self.reward != "world":
            raise DiffalignError(
                f"reward is {self.reward!r}, and users prefer by their own taste: leave out one of the two"
            )


def make_pairs(recipe: PairRecipe) -> list[Pair]:
    """The pairs of a recipe."""
    people = world_users(recipe.users) if recipe.users else ()
    blocks = (_block(recipe, index, people) for index in range(-(-recipe.n // BLOCK)))
    pairs = [pair for block in blocks for pair in block][: recipe.n]
    if recipe.shuffle_labels:
        order = np.random.default_rng([recipe.seed, 2**32 - 1]).permutation(recipe.n)
        pairs = [replace(p, first_is_better=pairs[k].first_is_better) for p, k in zip(pairs, order)]
    return pairs


def write_pairs(path: str | Path, recipe: PairRecipe, *, layout: Layout = "parquet", overwrite: bool = False) -> Path:
    """Write the pairs of a recipe to `path` and return it.

    `parquet`: one file in Pick-a-Pic's columns, plus score_0 and score_1; with users a column user, and beside the
    file NAME.users.json with their embeddings.
    `folder`: `path`/chosen/NAME.png, `path`/rejected/NAME.png and `path`/NAME.txt; `path` must be new or empty.
    `overwrite` replaces a parquet file that is there.
    """
    path = Path(path)
    check_target(path, layout, overwrite=overwrite, users=bool(recipe.users))
    write_layout(path, make_pairs(recipe), layout)
    if recipe.users:
        write_users(path.with_suffix(".users.json"), world_users(recipe.users))
    return path


def check_target(path: Path, layout: Layout, *, overwrite: bool, users: bool) -> None:
    """Raises DiffalignError for a layout that there is not or that has no place for `users`, ExistingFileError for a
    parquet file that is there (`overwrite` allows it) or a folder that is not empty."""
    if layout not in ("parquet", "folder"):
        raise DiffalignError(f"layout is {layout!r}; it must be 'parquet' or 'folder'")
    if layout == "folder" and path.exists() and (path.is_file() or any(path.iterdir())):
        raise ExistingFileError(
            f"{path} is not an empty folder; pairs are not mixed with what is there. Name a new one"
        )
    if layout == "parquet" and path.exists() and not (overwrite and path.is_file()):
        raise ExistingFileError(f"{path} exists; name another file, or overwrite it (--overwrite)")
    if users and layout == "folder":
        raise DiffalignError("a folder of pairs has no place for users; write a .parquet file")


def write_layout(path: Path, pairs: list[Pair], layout: Layout, quality: int | None = None) -> None:
    """Writes the pairs to `path`, a target that `check_target` has passed.

    `quality`: images in parquet are JPEGs of this quality with full colour, PNGs by default.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout == "parquet":
        _write_parquet(path, pairs, quality)
    else:
        _write_folder(path, pairs)


def _block(recipe: PairRecipe, index: int, users: Sequence[User]) -> Iterator[Pair]:
    """One block of pairs with true labels."""
    seed, source = recipe.seed, recipe.source
    rng = np.random.default_rng([seed, index])
    combinations = splits()["train"]
    wanted = [combinations[i] for i in rng.integers(0, len(combinations), BLOCK)]
    captions = [caption(c, k) for c, k in zip(wanted, rng.integers(0, len(TEMPLATES), BLOCK))]
    if source == "renders":
        pictures = np.stack([render(wanted, rng) for _ in range(2)], axis=1)
    else:
        pictures = _samples(captions, rng)
    whose = None
    if users:  # a generator of their own: the images stay
        drawn = np.random.default_rng([seed, index, 1]).integers(0, len(users), BLOCK)
        whose = [users[i] for i in drawn]
    scores = scores_of(pictures, wanted, REWARDS[recipe.reward], whose)
    best, worst = scores.argmax(1), scores.argmin(1)
    best_first = rng.random(BLOCK) < 0.5
    for i in range(BLOCK):
        sides = (best[i], worst[i]) if best_first[i] else (worst[i], best[i])
        yield Pair(
            captions[i],
            (pictures[i, sides[0]], pictures[i, sides[1]]),
            (float(scores[i, sides[0]]), float(scores[i, sides[1]])),
            bool(best_first[i]),
            f"{source}-{seed}-{index * BLOCK + i:05d}",
            whose[i].name if whose else None,
        )


def _samples(captions: list[str], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Four images [n 4 16 16 3] of each caption, made by the base."""
    from diffusers import StableDiffusionXLPipeline

    from diffalign.world.sample import sample_pixels

    pipe = StableDiffusionXLPipeline.from_pretrained(base_path())
    seeds = rng.integers(0, 2**31, (len(captions), BEST_OF))
    made = sample_pixels(pipe, [c for c in captions for _ in range(BEST_OF)], [int(s) for s in seeds.flat])
    return made.numpy().reshape(len(captions), BEST_OF, *made.shape[1:])


def scores_of(
    pictures: NDArray[np.uint8], wanted: list[Combination], reward: RewardOf, whose: Sequence[User] | None
) -> NDArray[np.float32]:
    """True rewards [n sides] of images [n sides 16 16 3]: by the taste of each pair's user where there are users."""
    sides = pictures.shape[1]
    reading = oracle.read(torch.from_numpy(pictures.reshape(-1, *pictures.shape[2:])))
    asked = [w for w in wanted for _ in range(sides)]
    if whose is None:
        return reward(reading, asked).view(-1, sides).numpy()
    tastes = torch.tensor([user.taste for user in whose]).repeat_interleave(sides)
    return oracle.taste_reward(reading, asked, tastes).view(-1, sides).numpy()


def encoded(picture: NDArray[np.uint8], quality: int | None = None) -> bytes:
    """A PNG, or a JPEG of this quality with full colour."""
    buffer = io.BytesIO()
    if quality is None:
        Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    else:
        Image.fromarray(picture).save(buffer, format="JPEG", quality=quality, subsampling=0, optimize=True)
    return buffer.getvalue()


def _write_parquet(path: Path, pairs: list[Pair], quality: int | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = [float(p.first_is_better) for p in pairs]
    columns = {
        "caption": [p.caption for p in pairs],
        "jpg_0": [encoded(p.pictures[0], quality) for p in pairs],  # Pick-a-Pic's name, whatever the format is
        "jpg_1": [encoded(p.pictures[1], quality) for p in pairs],
        "label_0": labels,
        "label_1": [1.0 - label for label in labels],
        "has_label": [True] * len(pairs),
        "are_different": [True] * len(pairs),
        "image_0_uid": [f"{p.name}-0" for p in pairs],
        "image_1_uid": [f"{p.name}-1" for p in pairs],
        "score_0": pa.array([p.scores[0] for p in pairs], pa.float32()),
        "score_1": pa.array([p.scores[1] for p in pairs], pa.float32()),
    }
    if pairs[0].user is not None:
        columns["user"] = [p.user for p in pairs]
    with written_whole(path) as partial:
        pq.write_table(pa.table(columns), partial, compression="zstd", row_group_size=PAIRS_PER_GROUP)


def _write_folder(path: Path, pairs: list[Pair]) -> None:
    with written_whole(path) as partial:
        _write_sides(partial, pairs)


def _write_sides(path: Path, pairs: list[Pair]) -> None:
    for side in ("chosen", "rejected"):
        (path / side).mkdir(parents=True)
    for p in pairs:
        chosen, rejected = p.pictures if p.first_is_better else p.pictures[::-1]
        (path / "chosen" / f"{p.name}.png").write_bytes(encoded(chosen))
        (path / "rejected" / f"{p.name}.png").write_bytes(encoded(rejected))
        (path / f"{p.name}.txt").write_text(p.caption + "\n", encoding="utf-8")


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m diffalign.world.pairs", description="write pairs of the world")
    parser.add_argument("--out", required=True, help="a .parquet file, or a new folder with --layout folder")
    parser.add_argument("--n", type=int, default=1024, help="number of pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", choices=("renders", "samples"), default="renders")
    parser.add_argument("--reward", choices=tuple(REWARDS), default="world", help="what makes an image the better one")
    parser.add_argument("--layout", choices=("parquet", "folder"), default="parquet")
    parser.add_argument("--shuffle-labels", action="store_true", help="a control: labels dealt out at random")
    a = parser.parse_args()
    recipe = PairRecipe(a.n, a.seed, a.source, a.reward, shuffle_labels=a.shuffle_labels)
    path = write_pairs(a.out, recipe, layout=a.layout)
    print(f"{a.n} pairs from {a.source} written to {path}")


if __name__ == "__main__":
    main()
