"""`diffalign compare | score | label`: pictures that are there, whoever made them, and a scorer's opinion of them.

A folder of pictures has a `manifest.jsonl`, which `diffalign generate` writes: file, prompt and seed of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from diffalign.cli_words import device_of, named
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.rewards import Scorer

FOLDER_HELP = "folder of pictures with a manifest.jsonl, as `diffalign generate` leaves it"


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """The base's folder, others by name, judges."""
    parser.add_argument("base", type=Path, help=FOLDER_HELP)
    parser.add_argument(
        "others",
        nargs="+",
        metavar="NAME=FOLDER",
        help="pictures of the same prompts and seeds; give NAME again for runs that differ in their training seed",
    )
    _scorer_arguments(parser, "may be repeated")
    parser.add_argument("--faithfulness", help="scorer that guards faithfulness to the prompt")
    parser.add_argument("--tie", type=float, help="|dR| below this is a tie (default: the scorer's own)")
    parser.add_argument("--out", type=Path, help="folder for result.json, table.txt, scores.jsonl and grid.png")


def compare(args: argparse.Namespace) -> None:
    """Prints the table of `evaluate` for pictures that exist."""
    from diffalign.evaluation.compare import compare as compare_pictures
    from diffalign.evaluation.evaluate import write_result
    from diffalign.evaluation.generate import read_manifest
    from diffalign.evaluation.report import BASE

    judges = _judges(args.scorer, args.device)
    (faithful,) = _judges([args.faithfulness], args.device) if args.faithfulness else (None,)
    base = read_manifest(args.base, whole=True)
    others = named(args.others, "")
    runs = {name: [read_manifest(path, whole=True) for path in paths] for name, paths in others.items()}
    if BASE in runs:
        raise DiffalignError(f"{BASE}=…: that is the first folder's name; give another")
    result, rows = compare_pictures(base, runs, judges, faithful, tie=args.tie, progress=True)
    print(result.table())
    if args.out is not None:
        write_result(args.out, result, rows, {BASE: base, **{name: some[0] for name, some in runs.items()}})
        print(f"{args.out}: result.json, table.txt, scores.jsonl, grid.png")


def score_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders and judges."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=FOLDER_HELP)
    _scorer_arguments(parser, "may be repeated")


def score(args: argparse.Namespace) -> None:
    """Writes each picture's scores to scores.jsonl in its folder, and prints means."""
    from diffalign.evaluation.scoring import score_folder

    judges = _judges(args.scorer, args.device)
    for folder in args.folders:
        rows = score_folder(folder, judges, progress=True)
        for judge in judges:
            values = [cast("float", row[judge.name]) for row in rows]
            mean = sum(values) / len(values)
            spread = f"{min(values):.4f} to {max(values):.4f}"
            print(f"{folder}: {judge.name} {mean:.4f} on average of {len(rows)} pictures ({spread})")
        print(f"{folder / 'scores.jsonl'}: every picture's")


def label_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders, one judge, a file for the pairs."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=FOLDER_HELP)
    _scorer_arguments(parser, "one")
    parser.add_argument("--tie", type=float, help="leave out prompts whose scores lie closer (default: the scorer's)")
    parser.add_argument("--out", type=Path, required=True, metavar="PARQUET", help="file of pairs, for data.path")


def label(args: argparse.Namespace) -> None:
    """Writes the best over the worst picture of each prompt as a preference pair."""
    from diffalign.evaluation.label import label_pictures

    if len(args.scorer) > 1:
        raise DiffalignError(
            "pairs are labelled by one --scorer; several can be combined later (`diffalign data score`)"
        )
    (judge,) = _judges(args.scorer, args.device)
    found = label_pictures(args.folders, judge, args.out, tie=args.tie, progress=True)
    print(
        f"{args.out}: {found.pairs} pairs; prompts left out: {found.ties} with a tie, {found.single} with one picture"
    )
    print(f"in a config: data.path={args.out}")


def _scorer_arguments(parser: argparse.ArgumentParser, how_many: str) -> None:
    parser.add_argument("--scorer", action="append", required=True, help=f"`diffalign list scorers`; {how_many}")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")


def _judges(names: Sequence[str], device: str | None) -> list[Scorer]:
    from diffalign.rewards import load_scorer

    return [load_scorer(name, device_of(device)) for name in names]
