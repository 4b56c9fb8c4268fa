"""`diffalign score`: scores of existing images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from diffalign.cli.common import number, overwrite_argument, path, writable
from diffalign.cli.images.options import FOLDER_HELP, load_scorers, scorer_arguments
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.rewards import Scorer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders and judges."""
    parser.add_argument("folders", nargs="+", type=path, metavar="FOLDER", help=FOLDER_HELP)
    scorer_arguments(parser, "may be repeated")
    parser.add_argument(
        "--ensemble",
        type=path,
        metavar="FILE",
        help="also write an ensemble of these scorers, measured on these images",
    )
    parser.add_argument(
        "--k", type=number(0, 100), help="of --ensemble: how much disagreement of scorers costs (default: 1)"
    )
    overwrite_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Writes each image's scores to scores.jsonl in its folder, and prints means; the file of an ensemble, if asked."""
    if args.ensemble is None and args.k is not None:
        raise DiffalignError("--k belongs to --ensemble FILE")
    _each_once("--scorer", args.scorer)
    _each_once("FOLDER", [str(folder.resolve()) for folder in args.folders])
    if args.ensemble is not None and len(args.scorer) < 2:
        raise DiffalignError("--ensemble needs two scorers or more; give each as a --scorer")
    if args.ensemble is not None and any(name.partition("=")[0] == "ensemble" for name in args.scorer):
        raise DiffalignError("--ensemble: a member cannot be an ensemble itself; name its scorers")
    writable([("--ensemble", args.ensemble)], args.overwrite)
    from diffalign.evaluation.manifest import read_image_manifest
    from diffalign.evaluation.scoring import SCORES, score_folder

    for folder in args.folders:
        read_image_manifest(folder, complete=True)
        writable([(f"{folder}:", folder / SCORES)], args.overwrite)
    judges = load_scorers(args.scorer, args.device)
    found: dict[str, list[float]] = {name: [] for name in args.scorer}
    for folder in args.folders:
        rows = score_folder(folder, judges)
        for name, judge in zip(args.scorer, judges, strict=True):
            values = [cast("float", row[judge.name]) for row in rows]
            found[name] += values
            mean = sum(values) / len(values)
            spread = f"{min(values):.4f} to {max(values):.4f}"
            print(f"{folder}: {judge.name} {mean:.4f} on average of {len(rows)} images ({spread})")
            _print_groups(judge, rows)
        print(f"{folder / SCORES}: the score of every image")
    if args.ensemble is not None:
        from diffalign.rewards.ensemble import write_ensemble

        write_ensemble(
            args.ensemble, 1.0 if args.k is None else args.k, found, [str(folder) for folder in args.folders]
        )
        print(f"{args.ensemble}: the ensemble, used as --scorer ensemble={args.ensemble}")


def _each_once(option: str, given: Sequence[str]) -> None:
    """Raises DiffalignError for a scorer or a folder that is named twice: its scores would count twice."""
    if twice := next((one for one in given if given.count(one) > 1), None):
        raise DiffalignError(f"{option} {twice} is given {given.count(twice)} times; give it once")


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
