"""What the commands share that write a page of images: its arguments, and what an evaluation has for one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from diffalign.cli.common import count, path, writable
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.evaluation.manifest import GeneratedImage
    from diffalign.evaluation.report import Result
    from diffalign.pages.comparison_page import Column, Comparison
    from diffalign.pages.html import ImageCoding

SIDE = 512
PAGE_OPTIONS = ("--page-side", "--page-title", "--page-note")
PAGE_HELP = "also write a page of all images with their scores, to search, filter and wipe"


def page_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """The page's file, its texts, and the size of its images."""
    parser.add_argument("--page", type=path, metavar="FILE.html", help=what)
    parser.add_argument(
        "--page-side",
        type=count,
        metavar="PIXELS",
        help=f"larger images are shrunk to this side in the page (default: {SIDE})",
    )
    parser.add_argument("--page-title", metavar="TEXT")
    parser.add_argument("--page-note", metavar="TEXT", help="a sentence below the page's title")


def check_page(args: argparse.Namespace) -> None:
    """Raises DiffalignError for a page that exists, and for its options without it."""
    given = [name for name in PAGE_OPTIONS if getattr(args, name[2:].replace("-", "_")) is not None]
    if given and args.page is None:
        raise DiffalignError(f"{given[0]} is of a page; give --page FILE.html, or leave it out")
    writable([("--page", args.page)], args.overwrite)


def coding_of(args: argparse.Namespace) -> ImageCoding:
    """How the page stores its images."""
    from diffalign.pages.html import ImageCoding

    return ImageCoding(side=args.page_side or SIDE)


def size_of(size: int) -> str:
    """A number of bytes as it is printed."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} kB"


def write_page(
    args: argparse.Namespace,
    result: Result,
    rows: Sequence[Mapping[str, object]],
    images: Mapping[str, Sequence[Sequence[GeneratedImage]]],
) -> None:
    """Writes the page of `--page`. rows: of scores.jsonl; images: by model those of each run, the base first."""
    from diffalign.pages.comparison_page import write_comparison_page

    size = write_comparison_page(args.page, comparison_of(args, result, rows, images), coding_of(args))
    print(f"{args.page}: {size_of(size)}, images of at most {args.page_side or SIDE} pixels (--page-side)")


def comparison_of(
    args: argparse.Namespace,
    result: Result,
    rows: Sequence[Mapping[str, object]],
    images: Mapping[str, Sequence[Sequence[GeneratedImage]]],
) -> Comparison:
    """Every run as a column, with all scores; the table has the models' gains over all of their runs."""
    from diffalign.pages.comparison_page import Column, Comparison, Gain

    ties: dict[str, float] = {}
    gains = []
    for model in result.models:
        measured = dict(model.scores)
        if result.faithfulness and model.faithfulness:
            measured.setdefault(result.faithfulness, model.faithfulness)
        for scorer, found in measured.items():
            ties[scorer] = found.tie
            gain, counts = found.gain, (found.wins, found.ties, found.losses)
            gains.append(Gain(model.name, scorer, gain.value, gain.low, gain.high, *counts))
    scores = {(row["model"], row["run"], row["prompt"], row["seed"]): row for row in rows}

    def column(name: str, run: int) -> Column:
        some = images[name][run]
        own = [scores[name, run, image.prompt, image.seed] for image in some]
        values = [[cast("float", row[scorer]) for row in own] for scorer in ties]
        return Column(name if len(images[name]) == 1 else f"{name}, run {run + 1}", some, values)

    columns = [column(name, run) for name, runs in images.items() for run in range(len(runs))]
    order = [(image.prompt, image.seed) for image in columns[0].images]
    return Comparison(
        [columns[0], *(_in_order(one, order) for one in columns[1:])],
        list(ties.items()),
        gains,
        title=args.page_title or "Base and tuned models",
        note=args.page_note or "",
    )


def _in_order(column: Column, order: Sequence[tuple[str, int]]) -> Column:
    """A column with its images in the base's order."""
    from diffalign.pages.comparison_page import Column

    place = {(image.prompt, image.seed): i for i, image in enumerate(column.images)}
    rows = [place[key] for key in order]
    return Column(column.name, [column.images[i] for i in rows], [[some[i] for i in rows] for some in column.scores])
