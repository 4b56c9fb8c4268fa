"""`diffalign label`: preference pairs from existing images, by a scorer (the best over the worst) or by eye."""

from __future__ import annotations

import argparse

from diffalign.cli.common import overwrite_argument, path, tie, writable
from diffalign.cli.images.options import FOLDER_HELP, load_scorers, scorer_arguments
from diffalign.cli.labels import by_eye, label_by_eye
from diffalign.cli.next_steps import print_next
from diffalign.errors import DiffalignError

SCORED = ("--scorer", "--device", "--tie")  # options that need a scorer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders, one judge, a file for the pairs."""
    parser.add_argument("folders", nargs="*", type=path, metavar="FOLDER", help=FOLDER_HELP)
    scorer_arguments(parser, "one", unless="--by-eye")
    parser.add_argument(
        "--tie", type=tie, help=("leave out prompts whose scores are closer than this (default: the scorer's)")
    )
    parser.add_argument("--out", type=path, required=True, metavar="PARQUET", help=("file of pairs, for data.path"))
    overwrite_argument(parser)
    parser.add_argument("--by-eye", action="store_true", help="judge on a page in the browser instead of by a scorer")
    label_by_eye.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the best over the worst image of each prompt as a preference pair, or what people prefer."""
    by_eye.only_with(args, "--by-eye", args.by_eye, SCORED if args.by_eye else label_by_eye.OPTIONS)
    if args.by_eye:
        label_by_eye.run(args)
        return
    from diffalign.evaluation.label import label_images

    if not args.folders or not args.scorer:
        raise DiffalignError("give folders of images and --scorer NAME, or judge with --by-eye")
    if len(args.scorer) > 1:
        raise DiffalignError(
            "pairs are labelled by one --scorer; several can be combined later (`diffalign data score`)"
        )
    writable([("--out", args.out)], args.overwrite)
    (judge,) = load_scorers(args.scorer, args.device)
    found = label_images(args.folders, judge, args.out, tie=args.tie, overwrite=args.overwrite)
    print(f"{args.out}: {found.pairs} pairs; prompts left out: {found.ties} with a tie, {found.single} with one image")
    print(f"in a config: data.path={args.out}")
    print_next(["data", "check", str(args.out)], ["init", "my.yaml", "--pairs", str(args.out)])
