"""`diffalign data relabel`: pairs with labels swapped or dropped, by the marks of a page or by a tuned model."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.cli.common import column_names, count, number, overwrite_argument, path, path_text, whole, writable
from diffalign.cli.next_steps import print_next
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.data.relabel import Decision
    from diffalign.data.spec import DataSpec
    from diffalign.data.table.pairs import PairTable

# options of --by, and how they are called in the parsed arguments
BY_RUN = {
    "--confident": "confident",
    "--threshold": "threshold",
    "--unsure": "unsure",
    "--keep-trained": "keep_trained",
    "--points": "points",
    "--batch-size": "batch_size",
}

AS_PAIRS = "`diffalign data convert LISTS --pairs-of-ranking all --out PAIRS` writes their pairs"


def add_relabel(actions: Any) -> None:
    """The action and its options."""
    sub = actions.add_parser("relabel", help="write pairs anew, labels swapped or dropped by decisions or a run")
    sub.add_argument(
        "pairs",
        nargs="?",
        type=path_text,
        metavar="PAIRS",
        help="file, folder or Hub id (default with --by: the run's)",
    )
    by = sub.add_mutually_exclusive_group(required=True)
    by.add_argument(
        "--decisions", type=path, metavar="FILE", help="decisions.csv of the page of doubtful pairs: keep, swap or drop"
    )
    by.add_argument("--by", type=path, metavar="RUN", help="label the pairs by the model of a run or a checkpoint")
    sub.add_argument(
        "--out", type=path, required=True, metavar="PAIRS", help="new .parquet or .jsonl file, or new folder"
    )
    group = sub.add_argument_group("how PAIRS are read")
    group.add_argument("--format", help="of the rows (default: recognised from the files)")
    group.add_argument("--split", help="of a Hub data set (default: train)")
    group.add_argument("--columns", nargs="*", default=[], metavar="PART=COLUMN", help="names that differ")
    group.add_argument(
        "--without", nargs="+", default=[], metavar="COLUMN", help="such as margin, which a swap refuses"
    )
    group = sub.add_argument_group("with --by")
    group.add_argument(
        "--confident",
        type=number(0, 1, above=True),
        metavar="SHARE",
        help="share of the pairs that get the model's label, the surest ones (default: 0.2)",
    )
    group.add_argument("--threshold", type=number(0, 1), metavar="SCORE", help="or those whose |score| is this or more")
    group.add_argument("--unsure", choices=("drop", "keep"), help="what becomes of the others (default: drop)")
    group.add_argument(
        "--keep-trained", action="store_true", help="pairs of PAIRS that the run trained on keep their labels"
    )
    group.add_argument("--points", type=whole(4, 256, multiple=4), help="(t, noise) of each pair (default: 8)")
    group.add_argument("--batch-size", type=count, help="pairs in a forward (default: the run's)")
    overwrite_argument(sub)


def relabel_pairs(args: argparse.Namespace) -> None:
    """Writes the pairs, and with --by the decisions beside them."""
    from diffalign.data.relabel import check_decisions, check_swaps, columns_of, counts, read_decisions, relabelled
    from diffalign.data.table.lists import not_lists
    from diffalign.data.table.open import open_pairs
    from diffalign.data.write_pairs import check_columns, check_images_stay, write_pairs

    listed = None if args.by is None else args.out.with_name(f"{args.out.stem}.decisions.csv")
    _check(args, listed)
    if listed is None:
        decisions = read_decisions(args.decisions)
        table, place = open_pairs(args.pairs, _spec(args)), args.pairs
        not_lists(table, place, AS_PAIRS)
        table.require_usable()
    else:
        from diffalign.training.heldout.doubtful import doubtful_pairs
        from diffalign.training.heldout.pseudo_labels import pseudo_labels

        given = None if args.pairs is None else (args.pairs, _spec(args))

        def may(table: PairTable, place: str) -> None:
            not_the_source(args.out, place)
            not_lists(table, place, AS_PAIRS)
            check_swaps(table, place, str(args.by))
            check_columns(args.out, columns_of(table))

        doubts = doubtful_pairs(args.by, points=args.points or 8, batch_size=args.batch_size, pairs=given, check=may)
        table, place = doubts.table, doubts.pairs
        decisions, least = pseudo_labels(doubts, _selection(args), str(args.by))
        print(f"{args.by}: labels pairs of {place} whose |score| is {least:.3g} or more")
    check_decisions(decisions, table, place)
    check_images_stay(args.out, table, place)
    check_columns(args.out, columns_of(table))
    if all(id in decisions and decisions[id].choice == "drop" for id in table.ids):
        raise DiffalignError(f"all {len(table)} pairs of {place} would be dropped; {args.out} is not written")
    write_pairs(args.out, relabelled(table, decisions), columns_of(table))
    print(f"{args.out}: {counts(table, decisions)}")
    if listed is not None:
        _write_decisions(listed, decisions.values())
        print(f"{listed}: the decision about every pair")
    print_next(["data", "check", str(args.out)])


def _check(args: argparse.Namespace, listed: Path | None) -> None:
    """Raises DiffalignError for options that contradict each other and for places that cannot be written."""
    from diffalign.data.write_pairs import check_pairs_out

    if args.by is None:
        if args.pairs is None:
            raise DiffalignError("PAIRS is missing: name the pairs that the decisions are about")
        if given := [option for option, name in BY_RUN.items() if getattr(args, name) not in (None, False)]:
            raise DiffalignError(f"{given[0]} belongs to --by RUN")
    if args.confident is not None and args.threshold is not None:
        raise DiffalignError("--confident and --threshold are both given; remove one of them")
    reading = [name for name in ("format", "split", "columns", "without") if getattr(args, name)]
    if args.pairs is None and reading:
        raise DiffalignError(f"--{reading[0]} belongs to PAIRS; those of the run are read as its config says")
    if args.pairs is not None:
        not_the_source(args.out, args.pairs)
    check_pairs_out(args.out, replace=args.overwrite and bool(args.out.suffix) and args.out.is_file())
    files = [("--out", args.out)] if args.out.suffix else []
    writable([*files, ("decisions beside --out:", listed)], args.overwrite)


def not_the_source(out: Path, pairs: str) -> None:
    """Raises DiffalignError where the new pairs would replace those that they come from, or be among them."""
    from diffalign.data.write_pairs import images_of

    source = Path(pairs).resolve()
    for place in (out, images_of(out)) if out.suffix == ".jsonl" else (out,):
        if source.exists() and nested(source, place.resolve()):
            raise DiffalignError(
                f"--out {out} is in the way of the pairs {pairs}, which are not changed; name another place"
            )


def nested(one: Path, two: Path) -> bool:
    """Whether two resolved paths are equal, or one is in the other."""
    return one == two or one in two.parents or two in one.parents


def _spec(args: argparse.Namespace) -> DataSpec:
    from diffalign.data.spec import DataSpec

    columns = column_names(args.columns) | dict.fromkeys(args.without, "")
    return DataSpec(format=args.format or "auto", split=args.split or "train", columns=columns)


def _selection(args: argparse.Namespace) -> Any:
    from diffalign.training.heldout.pseudo_labels import Selection

    share = None if args.threshold is not None else args.confident or Selection.share
    return Selection(share, args.threshold, args.unsure or Selection.unsure, args.keep_trained)


def _write_decisions(file: Path, decisions: Iterable[Decision]) -> None:
    from diffalign.io.files import written_whole

    with (
        written_whole(file, what="the decisions") as partial,
        partial.open("w", newline="", encoding="utf-8") as opened,
    ):
        rows = csv.writer(opened)
        rows.writerow(["id", "decision", "prompt", "chosen_image"])
        rows.writerows([each.id, each.choice, each.prompt, each.chosen_image] for each in decisions)
