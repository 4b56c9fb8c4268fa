"""`diffalign card`: the model card of a run, with the evaluation that was made since."""

from __future__ import annotations

import argparse

from diffalign.cli.common import overwrite_argument, path, path_text
from diffalign.cli.next_steps import print_next


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Run, evaluation, licence."""
    parser.add_argument(
        "tuned", metavar="RUN", type=path_text, help="output_dir of a run, or a folder with tuned weights"
    )
    parser.add_argument(
        "--evaluation",
        type=path,
        metavar="DIR",
        help="folder of `diffalign evaluate` with these weights (default: RUN/evaluation, or evaluation beside RUN)",
    )
    parser.add_argument(
        "--license", metavar="ID", help="licence of these weights, as the Hub names it: openrail++, apache-2.0, …"
    )
    parser.add_argument("--base", type=path_text, help="the base they were tuned from (default: the base of the run)")
    overwrite_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Writes README.md. Raises ValueError for an edited card and for an evaluation of other weights."""
    from diffalign.export.card.write import stated_license, write_run_card

    card = write_run_card(
        args.tuned, base=args.base, evaluation=args.evaluation, license=args.license, overwrite=args.overwrite
    )
    print(f"{card}: the model card")
    if "\n\nNot measured" in card.read_text(encoding="utf-8"):
        print("  without an evaluation of these weights: diffalign evaluate, then --evaluation DIR")
    if stated_license(card) is None:
        print("  without a licence: state one with --license")
    print_next(["push", args.tuned, "OWNER/NAME"])
