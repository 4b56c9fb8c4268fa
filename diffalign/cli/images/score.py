"""`diffalign score`: scores of existing images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, cast

from diffalign.cli.common import overwrite_argument, path, writable
from diffalign.cli.images.options import FOLDER_HELP, load_scorers, scorer_arguments

if TYPE_CHECKING:
    from diffalign.rewards import Scorer


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
            _print_groups(judge, rows)
        print(f"{folder / SCORES}: the score of every image")


def _print_groups(judge: Scorer, rows: list[dict[str, object]]) -> None:
    """The mean of each group of prompts, and the mean over groups, for a scorer that makes groups."""
    from diffalign.rewards.base import group_of

    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(group_of(judge, str(row["prompt"])), []).append(cast("float", row[judge.name]))
    if list(groups) == [""]:
        return
    means = {name: sum(values) / len(values) for name, values in groups.items()}
    for name, value in means.items():
        print(f"  {name:<14} {value:.4f} of {len(groups[name])} images")
    print(f"  mean of groups {sum(means.values()) / len(means):.4f}")
