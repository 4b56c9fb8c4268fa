"""`diffalign compare | score | label`: compare, score and label existing images.

A folder of pictures has a `manifest.jsonl`, which `diffalign generate` writes: file, prompt and seed of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from diffalign.cli.common import device, device_of, named, overwrite_argument, path, scorer, tie, writable
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.rewards import Scorer

FOLDER_HELP = "folder of images with a manifest.jsonl, as written by `diffalign generate`"


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """The base's folder, others by name, judges."""
    parser.add_argument("base", type=path, help=FOLDER_HELP)
    parser.add_argument(
        "others",
        nargs="+",
        metavar="NAME=FOLDER",
        help=("images of the same prompts and seeds; give NAME again for runs that differ in their training seed"),
    )
    _scorer_arguments(parser, "may be repeated")
    parser.add_argument("--faithfulness", type=scorer, help=("scorer that measures faithfulness to the prompt"))
    parser.add_argument("--tie", type=tie, help="|dR| below this is a tie (default: the scorer's own)")
    parser.add_argument("--out", type=path, help="folder for result.json, table.txt, scores.jsonl and grid.png")
    overwrite_argument(parser)


def compare(args: argparse.Namespace) -> None:
    """Prints the table of `evaluate` for existing images."""
    from diffalign.evaluation.compare import compare as compare_pictures
    from diffalign.evaluation.evaluate import RESULT_FILES, write_result
    from diffalign.evaluation.manifest import read_manifest
    from diffalign.evaluation.report import BASE
    from diffalign.evaluation.scoring import Scoring, load_judges

    others = named(args.others, "")
    if BASE in others:
        raise DiffalignError(f"{BASE}=…: that is the first folder's name; give another")
    if args.out is not None:
        writable([("--out", args.out / file) for file in RESULT_FILES], args.overwrite)
    base = read_manifest(args.base, whole=True)
    runs = {name: [read_manifest(folder, whole=True) for folder in folders] for name, folders in others.items()}
    judges = load_judges(Scoring(args.scorer, args.faithfulness, args.tie), device_of(args.device))
    result, rows = compare_pictures(base, runs, judges)
    print(result.table())
    if args.out is not None:
        write_result(args.out, result, rows, {BASE: base, **{name: some[0] for name, some in runs.items()}})
        print(f"{args.out}: result.json, table.txt, scores.jsonl, grid.png")


def score_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders and judges."""
    parser.add_argument("folders", nargs="+", type=path, metavar="FOLDER", help=FOLDER_HELP)
    _scorer_arguments(parser, "may be repeated")
    overwrite_argument(parser)


def score(args: argparse.Namespace) -> None:
    """Writes each image's scores to scores.jsonl in its folder, and prints means."""
    from diffalign.evaluation.manifest import read_manifest
    from diffalign.evaluation.scoring import SCORES, score_folder

    for folder in args.folders:
        read_manifest(folder, whole=True)
        writable([(f"{folder}:", folder / SCORES)], args.overwrite)
    judges = _judges(args.scorer, args.device)
    for folder in args.folders:
        rows = score_folder(folder, judges)
        for judge in judges:
            values = [cast("float", row[judge.name]) for row in rows]
            mean = sum(values) / len(values)
            spread = f"{min(values):.4f} to {max(values):.4f}"
            print(f"{folder}: {judge.name} {mean:.4f} on average of {len(rows)} pictures ({spread})")
        print(f"{folder / SCORES}: every picture's")


def label_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders, one judge, a file for the pairs."""
    parser.add_argument("folders", nargs="+", type=path, metavar="FOLDER", help=FOLDER_HELP)
    _scorer_arguments(parser, "one")
    parser.add_argument(
        "--tie", type=tie, help=("leave out prompts whose scores are closer than this (default: the scorer's)")
    )
    parser.add_argument("--out", type=path, required=True, metavar="PARQUET", help=("file of pairs, for data.path"))
    overwrite_argument(parser)


def label(args: argparse.Namespace) -> None:
    """Writes the best over the worst image of each prompt as a preference pair."""
    from diffalign.evaluation.label import label_pictures

    if len(args.scorer) > 1:
        raise DiffalignError(
            "pairs are labelled by one --scorer; several can be combined later (`diffalign data score`)"
        )
    writable([("--out", args.out)], args.overwrite)
    (judge,) = _judges(args.scorer, args.device)
    found = label_pictures(args.folders, judge, args.out, tie=args.tie, overwrite=args.overwrite)
    print(f"{args.out}: {found.pairs} pairs; prompts left out: {found.ties} with a tie, {found.single} with one image")
    print(f"in a config: data.path={args.out}")


def _scorer_arguments(parser: argparse.ArgumentParser, how_many: str) -> None:
    parser.add_argument(
        "--scorer", type=scorer, action="append", required=True, help=f"`diffalign list scorers`; {how_many}"
    )
    parser.add_argument("--device", type=device, help="default: cuda where there is one, else cpu")


def _judges(names: Sequence[str], device: str | None) -> list[Scorer]:
    from diffalign.rewards import load_scorer

    return [load_scorer(name, device_of(device)) for name in names]
