"""Preference pairs of the emoji world, labelled by the true reward, in the layouts that users' data come in.

    python -m diffalign.world.emoji.pairs --out assets/emoji/pairs/samples.parquet

Captions are of training combinations only; three of four leave the style open. The better image has the higher reward
R (`reward`), or R plus twice the probability of the style that a taste is for; `users` labels each pair by one of three
people, one for each style. Sources:
    samples   the best and the worst of four images that the base makes of one caption
    renders   the best and the worst of four renders of one caption with independent looks; in 15 % of them one
              attribute is not the caption's
Which side is shown first is drawn at random, so nothing but the label tells the chosen one. `controls` makes the same
pairs with other labels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffalign.errors import DiffalignError
from diffalign.world.emoji import base_path, reward
from diffalign.world.emoji.captions import BACKGROUNDS, STYLES, TEMPLATES, THINGS, Combination, caption, combinations
from diffalign.world.emoji.render import render
from diffalign.world.pairs import BEST_OF, Layout, Pair, Source, check_target, write_layout

BLOCK = 128  # pairs made at once; each block has its own generator, so the first n pairs do not depend on n
NAMED_STYLE = 0.25  # share of captions that name one
REDRAWN = 0.15  # share of renders with an attribute that is not the caption's
NO_TASTE = "none"  # R alone
JPEG_QUALITY = 95  # in parquet: samples have a PSNR of 41 dB, at 40 % of a PNG's bytes
TASTES = (NO_TASTE, *STYLES)
DIM = 8  # of users' embeddings


@dataclass(frozen=True)
class PairRecipe:
    """Which pairs are made: the same recipe makes the same pairs, and n pairs are the first n of more.

    Raises DiffalignError for a number, source or taste that there is not.
    """

    n: int
    seed: int
    source: Source = "samples"
    taste: str | None = "glossy"  # a style; "none": R alone; None: each pair is labelled by one of three users

    def __post_init__(self) -> None:
        if self.n < 1:
            raise DiffalignError(f"n is {self.n}; make at least one pair")
        for name, value, known in (
            ("source", self.source, ("samples", "renders")),
            ("taste", self.taste, (*TASTES, None)),
        ):
            if value not in known:
                raise DiffalignError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, known))}")


def make_pairs(recipe: PairRecipe) -> list[Pair]:
    """The pairs of a recipe."""
    blocks = (_block(recipe, k) for k in range(-(-recipe.n // BLOCK)))
    return [pair for block in blocks for pair in block][: recipe.n]


def users() -> dict[str, list[float]]:
    """The three users by name, which is the style they like, with fixed random unit vectors as embeddings."""
    vectors = np.random.default_rng(0).normal(size=(len(STYLES), DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return {style: [round(float(x), 6) for x in vector] for style, vector in zip(STYLES, vectors)}


def write_pairs(path: str | Path, recipe: PairRecipe, *, layout: Layout = "parquet", overwrite: bool = False) -> Path:
    """Writes the pairs of a recipe to `path` and returns it; layouts are those of `diffalign.world.pairs`.

    With users (taste None, parquet only) their embeddings are written beside the file, as NAME.users.json. Raises
    ExistingFileError for a target that is there.
    """
    path = Path(path)
    check_target(path, layout, overwrite=overwrite, users=recipe.taste is None)
    write_layout(path, make_pairs(recipe), layout, JPEG_QUALITY)
    if recipe.taste is None:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(vector)}" for name, vector in users().items())
        path.with_suffix(".users.json").write_text("{\n" + lines + "\n}\n")
    return path


def _block(recipe: PairRecipe, index: int) -> Iterator[Pair]:
    """One block of pairs with true labels."""
    seed, source, taste = recipe.seed, recipe.source, recipe.taste
    rng = np.random.default_rng([seed, index])
    known = combinations("train")
    styles = np.where(rng.random(BLOCK) < NAMED_STYLE, rng.integers(0, len(STYLES), BLOCK), -1)
    chosen = rng.integers(0, len(known), BLOCK)
    wanted = [known[i]._replace(style=STYLES[s] if s >= 0 else None) for i, s in zip(chosen, styles)]
    captions = [caption(c, k) for c, k in zip(wanted, rng.integers(0, len(TEMPLATES), BLOCK))]
    if source == "renders":
        images = np.stack([render(_with_faults(wanted, rng), rng) for _ in range(BEST_OF)], axis=1)
    else:
        images = _samples(captions, rng)
    # A generator of their own: the images are the same with and without users.
    drawn = np.random.default_rng([seed, index, 1]).integers(0, len(STYLES), BLOCK)
    tastes = [STYLES[k] for k in drawn] if taste is None else [taste] * BLOCK
    scores = _scores(images, wanted, tastes)
    best, worst = scores.argmax(1), scores.argmin(1)
    best_first = rng.random(BLOCK) < 0.5
    for i in range(BLOCK):
        sides = (best[i], worst[i]) if best_first[i] else (worst[i], best[i])
        yield Pair(
            captions[i],
            (images[i, sides[0]], images[i, sides[1]]),
            (float(scores[i, sides[0]]), float(scores[i, sides[1]])),
            bool(best_first[i]),
            f"{source}-{seed}-{index * BLOCK + i:05d}",
            tastes[i] if taste is None else None,
        )


def _with_faults(wanted: Sequence[Combination], rng: np.random.Generator) -> list[Combination]:
    """The combinations, 15 % of them with another thing, background or (where it is named) style, all of `train`."""
    known, shown = set(combinations("train")), []
    for c in wanted:
        options = {"thing": THINGS, "background": BACKGROUNDS, **({"style": STYLES} if c.style else {})}
        name = list(options)[rng.integers(len(options))]
        others = [c._replace(**{name: value}) for value in options[name] if value != getattr(c, name)]
        others = [other for other in others if other._replace(style=None) in known]
        other = others[rng.integers(len(others))]
        shown.append(other if rng.random() < REDRAWN else c)
    return shown


def _samples(captions: list[str], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Four images [n 4 64 64 3] of each caption, made by the committed base."""
    from diffusers import StableDiffusionXLPipeline

    from diffalign.world.sample import sample_pixels

    pipe = StableDiffusionXLPipeline.from_pretrained(base_path())
    seeds = rng.integers(0, 2**31, (len(captions), BEST_OF))
    made = sample_pixels(pipe, [c for c in captions for _ in range(BEST_OF)], [int(s) for s in seeds.flat])
    return made.numpy().reshape(len(captions), BEST_OF, *made.shape[1:])


def _scores(images: NDArray[np.uint8], wanted: Sequence[Combination], tastes: Sequence[str]) -> NDArray[np.float32]:
    """True rewards [n sides] of images [n sides 64 64 3], by the taste of each pair."""
    sides = images.shape[1]
    reading = reward.read(torch.from_numpy(images.reshape(-1, *images.shape[2:])))
    scores = reward.reward(reading, [c for c in wanted for _ in range(sides)]).view(-1, sides)
    likes = reading.style.view(-1, sides, len(STYLES))
    for i, taste in enumerate(tastes):
        if taste != NO_TASTE:
            scores[i] += reward.TASTE * likes[i, :, STYLES.index(taste)]
    return scores.numpy()


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m diffalign.world.emoji.pairs", description="write preference pairs of the emoji world"
    )
    parser.add_argument("--out", required=True, help="a .parquet file, or a new folder with --layout folder")
    parser.add_argument("--n", type=int, default=768, help="number of pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", choices=("samples", "renders"), default="samples")
    parser.add_argument("--taste", choices=TASTES, default="glossy", help="the style that is liked; none: R alone")
    parser.add_argument("--users", action="store_true", help="label by three users, one for each style, not by --taste")
    parser.add_argument("--layout", choices=("parquet", "folder"), default="parquet")
    a = parser.parse_args()
    recipe = PairRecipe(a.n, a.seed, a.source, None if a.users else a.taste)
    path = write_pairs(a.out, recipe, layout=a.layout)
    print(f"{a.n} pairs of {a.source} written to {path}")


if __name__ == "__main__":
    main()
