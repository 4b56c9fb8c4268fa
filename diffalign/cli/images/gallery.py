"""`diffalign gallery`: a page on which a slider moves tuned models through strengths."""

from __future__ import annotations

import argparse

from diffalign.cli.common import named_paths, overwrite_argument, path_text, scorer, strengths, writable
from diffalign.cli.images.options import given_sampling, sampling_arguments
from diffalign.cli.images.pages import coding_of, page_arguments, size_of
from diffalign.errors import DiffalignError

PAGE = "gallery.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Base, tuned models by name, strengths, scorers, and sampling."""
    parser.add_argument("base", type=path_text, help="the base of the tuned models: folder, Hub id or single file")
    parser.add_argument(
        "--tuned", action="append", required=True, metavar="NAME=PATH", help="a LoRA or full UNet; may be repeated"
    )
    parser.add_argument(
        "--strengths",
        type=strengths,
        default="0,0.25,0.5,0.75,1,1.25,1.5",
        help="base + S · (tuned − base); for a LoRA the factor of its update (default: %(default)s)",
    )
    parser.add_argument("--scorer", type=scorer, action="append", default=[], help="shown with each image")
    sampling_arguments(parser)
    page_arguments(parser, f"the page (default: {PAGE} in --out)")
    overwrite_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Generates the images that are missing, and writes the page."""
    from diffalign.data.table.prompts import read_prompts
    from diffalign.evaluation.generate import generate_by
    from diffalign.evaluation.recipe import ImageRecipe, Tuned
    from diffalign.evaluation.report import BASE
    from diffalign.evaluation.scoring import load_judges, score_images
    from diffalign.pages.comparison_page import Column
    from diffalign.pages.strengths_page import Strengths, write_strengths_page
    from diffalign.rewards.base import check_prompts

    tuned = named_paths(args.tuned, "--tuned")
    if odd := [name for name, paths in tuned.items() if len(paths) > 1 or name == BASE]:
        raise DiffalignError(f"--tuned {odd[0]}=…: give each model once, under a name of its own other than {BASE}")
    if args.users or args.user:
        raise DiffalignError("--user: weights that were tuned for users have no strength; use `diffalign generate`")
    page = args.page or args.out / PAGE
    writable([("--page", page)], args.overwrite)
    prompts, sampling = read_prompts(args.prompts, limit=args.limit), given_sampling(args)
    judges = load_judges(args.scorer, sampling.device).every if args.scorer else []
    check_prompts(judges, prompts)

    def recipe(weights: Tuned) -> ImageRecipe:
        return ImageRecipe(args.base, weights, sampling)

    recipes = {
        (name, s): recipe(Tuned(path, strength=s))
        for name, (path,) in tuned.items()
        for s in args.strengths
        if s != 0  # which is the base
    }

    def column(name: str, one: ImageRecipe) -> Column:
        images = generate_by(one, prompts, args.seeds, args.out / "images" / f"{name}-{one.tag}")
        scores = score_images(images, judges) if judges else {}
        return Column(name, images, [scores[judge.name].tolist() for judge in judges])

    base = column(BASE, recipe(Tuned()))
    columns = {(name, s): column(f"{name}-at-{s:g}", one) for (name, s), one in recipes.items()}
    gallery = Strengths(
        base,
        args.strengths,
        [(name, [columns.get((name, s), base) for s in args.strengths]) for name in tuned],
        [(judge.name, 3) for judge in judges],
        title=args.page_title or "Tuned models by strength",
        note=args.page_note or "",
    )
    print(f"{page}: {size_of(write_strengths_page(page, gallery, coding_of(args)))}")
