"""`diffalign data doubtful`: the pairs of a run that its model ranks against their label."""

from __future__ import annotations

import argparse
import csv
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.cli.common import count, overwrite_argument, path, whole, writable
from diffalign.cli.next_steps import print_next

if TYPE_CHECKING:
    from diffalign.data.spec import DataSpec
    from diffalign.pages.doubtful_page import DoubtfulPair
    from diffalign.training.heldout.doubtful import Doubts

HEAD = (
    "rank",
    "score",
    "score_error",
    "margin",
    "agreeing",
    "heldout",
    "id",
    "row",
    "where",
    "prompt",
    "chosen",
    "rejected",
)


def add_doubtful(actions: Any) -> None:
    """The action and its options."""
    sub = actions.add_parser("doubtful", help="rank the pairs of a run by how strongly its model disagrees with them")
    sub.add_argument("run_dir", metavar="RUN", type=path, help="a run's folder, or one of its checkpoints")
    sub.add_argument("--out", type=path, default=Path("doubtful.csv"), metavar="CSV", help="default: %(default)s")
    sub.add_argument("--page", type=path, metavar="HTML", help="write a page with both pictures, to mark swap and drop")
    sub.add_argument("--top", type=count, default=200, help="pairs on the page (default: %(default)s)")
    sub.add_argument(
        "--points", type=whole(4, 256, multiple=4), default=8, help="(t, noise) of each pair (default: %(default)s)"
    )
    sub.add_argument(
        "--checkpoints", type=whole(0), metavar="N", help="measure the newest N beside the final weights (default: all)"
    )
    sub.add_argument("--batch-size", type=count, help="pairs in a forward (default: the run's)")
    overwrite_argument(sub)


def write_doubtful(args: argparse.Namespace) -> None:
    """Measures the pairs and writes csv and page."""
    writable([("--out", args.out), ("--page", args.page)], args.overwrite)
    from diffalign.training.heldout.doubtful import doubtful_pairs
    from diffalign.training.processes import one_process

    one_process("data doubtful")
    doubts = doubtful_pairs(args.run_dir, points=args.points, batch_size=args.batch_size, newest=args.checkpoints)
    against = sum(doubt.score < 0 for doubt in doubts.ranked)
    summary = (
        f"{len(doubts.ranked)} pairs of {doubts.pairs} at {args.points} points each; the models of "
        f"{args.run_dir} ({', '.join(doubts.weights)}) rank {against} of them against their label"
    )
    _write_csv(args.out, doubts)
    print(f"{args.out}: {summary}")
    if args.page is None:
        print_next(["data", "doubtful", str(args.run_dir), "--out", str(args.out), "--page", "doubtful.html"])
        return
    from diffalign.pages.doubtful_page import write_doubtful_page

    relabel = ["data", "relabel", doubts.pairs, "--decisions", "decisions.csv", "--out", "corrected.parquet"]
    relabel += _read_as(doubts.spec)
    title, command = f"Doubtful pairs of {args.run_dir}", shlex.join(["diffalign", *relabel])
    write_doubtful_page(args.page, _shown(doubts, args.top), title=title, note=summary, next_command=command)
    shown = min(args.top, len(doubts.ranked))
    print(f"{args.page}: the first {shown} with their pictures; mark them, and save decisions.csv")
    judge = ["label", "--pairs", doubts.pairs, "--only", str(args.out), "--by-eye", "--keep-unjudged"]
    print_next(relabel, [*judge, "--out", "judged.parquet"])


def _read_as(spec: DataSpec) -> list[str]:
    """The options of `data relabel` by which pairs are read as the run reads them."""
    options = [] if spec.format == "auto" else ["--format", spec.format]
    options += [] if spec.split == "train" else ["--split", spec.split]
    named = [f"{part}={column}" for part, column in spec.columns.items() if column]
    left_out = [part for part, column in spec.columns.items() if not column]
    return [*options, *(["--columns", *named] if named else []), *(["--without", *left_out] if left_out else [])]


def _write_csv(file: Path, doubts: Doubts) -> None:
    from diffalign.io.files import written_whole
    from diffalign.training.heldout.doubtful import image_path

    table = doubts.table
    with (
        written_whole(file, what="the list of doubtful pairs") as partial,
        partial.open("w", newline="", encoding="utf-8") as opened,
    ):
        rows = csv.writer(opened)
        rows.writerow(HEAD)
        for rank, doubt in enumerate(doubts.ranked, start=1):
            i = doubt.index
            numbers = [f"{value:.6g}" for value in (doubt.score, doubt.error, doubt.margin, doubt.agreeing)]
            images = [image_path(table, i, side) for side in ("chosen", "rejected")]
            place = [table.ids[i], table.index.rows[i], table.where(i), table.prompts[i]]
            rows.writerow([rank, *numbers, int(doubt.heldout), *place, *images])


def _shown(doubts: Doubts, top: int) -> Iterator[DoubtfulPair]:
    """The first pairs for the page; their images are opened one pair at a time."""
    from diffalign.pages.doubtful_page import DoubtfulPair

    for rank, doubt in enumerate(doubts.ranked[:top], start=1):
        row = doubts.table[doubt.index]
        quarter = "" if doubt.worst_quarter is None else f"most in quarter {doubt.worst_quarter} of t"
        yield DoubtfulPair(
            rank=rank,
            id=row.id,
            prompt=row.prompt,
            chosen=row.chosen.open(),
            rejected=row.rejected.open(),
            margin=doubt.margin,
            quarter=quarter + (", held out" if doubt.heldout else ""),
            chosen_image=doubts.table.index.first[doubt.index],
        )
