"""`diffalign label`: preference pairs from existing images, the best over the worst of each prompt."""

from __future__ import annotations

import argparse

from diffalign.cli.common import overwrite_argument, path, tie, writable
from diffalign.cli.images.options import FOLDER_HELP, load_scorers, scorer_arguments
from diffalign.cli.next_steps import print_next
from diffalign.errors import DiffalignError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders, one judge, a file for the pairs."""
    parser.add_argument("folders", nargs="+", type=path, metavar="FOLDER", help=FOLDER_HELP)
    scorer_arguments(parser, "one")
    parser.add_argument(
        "--tie", type=tie, help=("leave out prompts whose scores are closer than this (default: the scorer's)")
    )
    parser.add_argument("--out", type=path, required=True, metavar="PARQUET", help=("file of pairs, for data.path"))
    overwrite_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the best over the worst image of each prompt as a preference pair."""
    from diffalign.evaluation.label import label_images

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
