"""`diffalign compare`: the table of `evaluate` for existing image folders.

A folder of images has a `manifest.jsonl`, which `diffalign generate` writes: file, prompt and seed of each.
"""

from __future__ import annotations

import argparse

from diffalign.cli.common import device_of, named_paths, overwrite_argument, path, writable
from diffalign.cli.images.options import FOLDER_HELP, judging_arguments, scorer_arguments
from diffalign.errors import DiffalignError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The base's folder, others by name, judges."""
    parser.add_argument("base", type=path, help=FOLDER_HELP)
    parser.add_argument(
        "others",
        nargs="+",
        metavar="NAME=FOLDER",
        help=("images of the same prompts and seeds; give NAME again for runs that differ in their training seed"),
    )
    scorer_arguments(parser, "may be repeated")
    judging_arguments(parser)
    parser.add_argument("--out", type=path, help="folder for result.json, table.txt, scores.jsonl and grid.png")
    overwrite_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the table of `evaluate` for existing images."""
    from diffalign.evaluation.compare import compare
    from diffalign.evaluation.evaluate import RESULT_FILES, write_result
    from diffalign.evaluation.manifest import read_image_manifest
    from diffalign.evaluation.report import BASE
    from diffalign.evaluation.scoring import Scoring, load_judges

    others = named_paths(args.others, "")
    if BASE in others:
        raise DiffalignError(f"{BASE}=…: that is the first folder's name; give another")
    if args.out is not None:
        writable([("--out", args.out / file) for file in RESULT_FILES], args.overwrite)
    base = read_image_manifest(args.base, complete=True)
    runs = {
        name: [read_image_manifest(folder, complete=True) for folder in folders] for name, folders in others.items()
    }
    judges = load_judges(Scoring(args.scorer, args.faithfulness, args.tie), device_of(args.device))
    result, rows = compare(base, runs, judges)
    print(result.table())
    if args.out is not None:
        write_result(args.out, result, rows, {BASE: base, **{name: some[0] for name, some in runs.items()}})
        print(f"{args.out}: result.json, table.txt, scores.jsonl, grid.png")
