"""`diffalign data lists`: ranked lists from pairs that share images, for objectives that compare whole lists."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from diffalign.cli.common import overwrite_argument, path, writable
from diffalign.cli.next_steps import print_next
from diffalign.cli.pairs.check import pairs_arguments, spec_of
from diffalign.cli.training.relabel import not_the_source
from diffalign.errors import DiffalignError


def add_lists(actions: Any) -> None:
    """The action and its options."""
    sub = actions.add_parser("lists", help="write ranked lists: chains of preferences among the images of a prompt")
    pairs_arguments(sub)
    sub.add_argument("--out", type=path, required=True, metavar="LISTS", help="new .parquet file, images inside")
    overwrite_argument(sub)


def write_lists(args: argparse.Namespace) -> None:
    """Writes the lists, and says how many there are of each length and which comparisons are in none."""
    from diffalign.data.formats.rankings import write_rankings
    from diffalign.data.rewrite.chains import chains_of
    from diffalign.data.spec import is_remote
    from diffalign.data.table.lists import not_lists
    from diffalign.data.table.open import open_pairs

    if args.out.suffix != ".parquet":
        raise DiffalignError(f"--out {args.out}: lists are written as .parquet; name the file {args.out.stem}.parquet")
    if is_remote(args.path):
        raise DiffalignError(f"{args.path}: every image is read, so remote data are copied here first; name the folder")
    not_the_source(args.out, args.path)
    writable([("--out", args.out)], args.overwrite)
    table = open_pairs(args.path, spec_of(args))
    not_lists(table, args.path, "the objective listwise_dpo takes them as they are")
    table.require_usable()
    found = chains_of(table)
    if not found.lists:
        raise DiffalignError(f"all preferences of {args.path} contradict each other: there is no list to write")
    write_rankings(args.out, found.rows(table))
    lengths = sorted(Counter(len(places) for _, places in found.lists).items())
    print(f"{args.out}: {', '.join(f'{lists} of {length}' for length, lists in lengths)} images, of {len(table)} pairs")
    if found.repeated or found.circles:
        print(f"left out: {found.repeated} repeated pairs, {found.circles} preferences that contradict others")
    if dropped := sum(problem.dropped for problem in table.problems):
        print(f"{dropped} rows of {args.path} are no usable pairs and are left out; `diffalign data check` names them")
    print_next(["data", "check", str(args.out)])
