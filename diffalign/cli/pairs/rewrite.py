"""`diffalign data convert`, `split`, `dedupe`: pairs in another layout, in two parts by prompt, or without doubles."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.cli.common import LAST_SEED, column_names, number, overwrite_argument, path, path_text, whole, writable
from diffalign.cli.next_steps import print_next
from diffalign.cli.training.relabel import nested, not_the_source
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.data.table.pairs import PairTable

WITH_LISTS = {
    "convert": "add --pairs-of-ranking all, best_worst or adjacent for their pairs",
    "split": "validation.pairs: 0.1 in a config holds out a share of the lists as they are",
    "dedupe": "remove repeated lists from the file itself",
}  # what to do
LAYOUT = "new .parquet or .jsonl file, or new folder"


def add_rewrites(actions: Any) -> None:
    """The three actions and their options."""
    sub = actions.add_parser("convert", help="write pairs in another layout: parquet, jsonl with images, or a folder")
    _arguments(sub)
    sub.add_argument(
        "--pairs-of-ranking",
        choices=("all", "best_worst", "adjacent"),
        help="which pairs of ranked lists are written, as data.pairs_of_ranking (default: lists are refused)",
    )
    sub = actions.add_parser("split", help="write pairs in two parts that share no prompt")
    _arguments(sub)
    sub.add_argument("--heldout-out", type=path, required=True, metavar="PAIRS", help=f"the held-out pairs: {LAYOUT}")
    sub.add_argument("--share", type=number(0, 1, above=True), default=0.1, help="of the pairs (default: %(default)s)")
    sub.add_argument("--seed", type=whole(0, LAST_SEED), default=0, help="of the choice of prompts")
    sub = actions.add_parser("dedupe", help="write pairs without those that are there twice")
    _arguments(sub)
    sub.add_argument(
        "--contradictions",
        choices=("drop", "keep"),
        help="what becomes of pairs that are there with both labels (default: they are refused)",
    )
    sub.add_argument(
        "--against", type=path_text, metavar="PAIRS", help="drop pairs with an image that is in these, e.g. a test set"
    )


def _arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", type=path_text, metavar="PAIRS", help="file, folder or Hub id")
    sub.add_argument("--out", type=path, required=True, metavar="PAIRS", help=LAYOUT)
    sub.add_argument("--format", default="auto", help="of the rows (default: recognised from the files)")
    sub.add_argument("--split", default="train", help="of a Hub data set (default: %(default)s)")
    sub.add_argument("--columns", nargs="*", default=[], metavar="PART=COLUMN", help="names that differ")
    overwrite_argument(sub)


def rewrite_pairs(args: argparse.Namespace) -> None:
    """Runs one of the three."""
    from diffalign.data.heldout import split_by_prompt
    from diffalign.data.relabel import lost_columns

    outs = [args.out, args.heldout_out] if args.action == "split" else [args.out]
    table = _opened(args, outs)
    if args.action == "split":
        parts = split_by_prompt(table.prompts, args.share, args.seed, setting="--share")
        for out, places in zip(outs, parts, strict=True):
            _write(out, table.part(places))
    else:
        _write(args.out, table.part(_unique(args, table)) if args.action == "dedupe" else table)
    if dropped := sum(problem.dropped for problem in table.problems):
        print(f"{dropped} rows of {args.path} are no usable pairs and are left out; `diffalign data check` names them")
    if lost := lost_columns(table):
        print(f"left out: the columns {', '.join(lost)}")
    print_next(["data", "check", str(args.out)])


def _opened(args: argparse.Namespace, outs: list[Path]) -> PairTable:
    """The pairs, once it is known that the new ones can be written. Raises DiffalignError."""
    from diffalign.data.relabel import columns_of
    from diffalign.data.spec import DataSpec, is_remote
    from diffalign.data.table.lists import not_lists
    from diffalign.data.table.open import open_pairs
    from diffalign.data.write_pairs import check_columns, check_images_stay, check_pairs_out, images_of

    if is_remote(args.path):
        raise DiffalignError(f"{args.path}: every image is read, so remote data are copied here first; name the folder")
    if len(outs) == 2:
        one, two = ([out.resolve(), *([images_of(out).resolve()] if out.suffix == ".jsonl" else [])] for out in outs)
        if any(nested(a, b) for a in one for b in two):
            raise DiffalignError(
                f"--out {outs[0]} and --heldout-out {outs[1]} are in each other's way; name two places"
            )
    for out in outs:
        not_the_source(out, args.path)
        check_pairs_out(out, replace=args.overwrite and bool(out.suffix))
    writable([("--out", out) for out in outs if out.suffix], args.overwrite)
    spec = DataSpec(
        args.format,
        args.split,
        column_names(args.columns),
        keep_ties=all(out.suffix for out in outs),
        pairs_of_ranking=(of_ranking := getattr(args, "pairs_of_ranking", None)) or "all",
    )  # a folder has no place for ties, which are then among the rows that are left out
    table = open_pairs(args.path, spec)
    if of_ranking is None:
        not_lists(table, args.path, WITH_LISTS[args.action])
    table.require_usable()
    for out in outs:
        check_columns(out, columns_of(table))
        check_images_stay(out, table, args.path)
    return table


def _unique(args: argparse.Namespace, table: PairTable) -> list[int]:
    """The pairs that stay. Raises DiffalignError for contradictions that nothing was said about."""
    from diffalign.data.rewrite.duplicates import find_duplicates
    from diffalign.data.spec import DataSpec
    from diffalign.data.table.open import open_pairs

    other = None if args.against is None else open_pairs(args.against, DataSpec(keep_ties=True, verify="none"))
    found = find_duplicates(table, other)
    if found.contradictory and args.contradictions is None:
        raise DiffalignError(
            f"{len(found.contradictory)} pairs of {args.path} are there with both labels (first: "
            f"{table.where(found.contradictory[0])}); add --contradictions drop, or keep"
        )
    gone = {*found.repeated, *found.shared}
    if args.contradictions == "drop":
        gone |= set(found.contradictory)
    print(
        f"dropped: {len(found.repeated)} repeated"
        + (f", {len(found.contradictory)} with both labels" if args.contradictions == "drop" else "")
        + (f", {len(found.shared)} with an image of {args.against}" if args.against is not None else "")
    )
    if len(gone) == len(table):
        raise DiffalignError(f"no pair of {args.path} is left; nothing was written")
    return [index for index in range(len(table)) if index not in gone]


def _write(out: Path, table: PairTable) -> None:
    from diffalign.data.relabel import columns_of, relabelled
    from diffalign.data.write_pairs import write_pairs
    from diffalign.io.progress import Progress

    pairs = Progress(relabelled(table, {}), total=len(table), desc="pairs", unit=" pairs", delay=3.0)
    write_pairs(out, pairs, columns_of(table))
    print(f"{out}: {len(table)} pairs" + (f" (of them {table.ties} ties)" if table.ties else ""))
