"""`diffalign score`: scores of existing images."""

from __future__ import annotations

import argparse
from typing import cast

from diffalign.cli.common import overwrite_argument, path, writable
from diffalign.cli.images.options import FOLDER_HELP, load_scorers, scorer_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders and judges."""
    parser.add_argument("folders", nargs="+", type=path, metavar="FOLDER", help=FOLDER_HELP)
    scorer_arguments(parser, "may be repeated")
    overwrite_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Writes each image's scores to scores.jsonl in its folder, and prints means."""
    from diffalign.evaluation.manifest import read_image_manifest
    from diffalign.evaluation.scoring import SCORES, score_folder

    for folder in args.folders:
        read_image_manifest(folder, complete=True)
        writable([(f"{folder}:", folder / SCORES)], args.overwrite)
    judges = load_scorers(args.scorer, args.device)
    for folder in args.folders:
        rows = score_folder(folder, judges)
        for judge in judges:
            values = [cast("float", row[judge.name]) for row in rows]
            mean = sum(values) / len(values)
            spread = f"{min(values):.4f} to {max(values):.4f}"
            print(f"{folder}: {judge.name} {mean:.4f} on average of {len(rows)} images ({spread})")
        print(f"{folder / SCORES}: the score of every image")
