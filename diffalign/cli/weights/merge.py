"""`diffalign merge`: weighted sums of tuned weights."""

from __future__ import annotations

import argparse

from diffalign.cli.common import path, path_text, weighted_paths
from diffalign.cli.next_steps import export_commands, print_next


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Base, output and parts."""
    parser.add_argument(
        "base", type=path_text, help=("the base that the tuned weights were tuned from: folder, Hub id or single file")
    )
    parser.add_argument("out", type=path, help="output folder, loadable as --tuned")
    parser.add_argument("parts", nargs="+", metavar="PATH=WEIGHT", help="e.g. runs/a=0.5 runs/b=0.5, or runs/a=1.5")


def run(args: argparse.Namespace) -> None:
    """Runs it. Raises ValueError for a part of another form."""
    from diffalign.models.adapters.merge import check_factors, merge_tuned
    from diffalign.models.loading.base import load_base

    parts = weighted_paths(args.parts)
    check_factors(parts)  # before the base is read
    written = merge_tuned(load_base(args.base, vae_and_text=False), parts, args.out)
    total = sum(weight for _, weight in parts)
    print(f"{written}: the base plus {' '.join(args.parts)} of what tuning changed (weights sum to {total:g})")
    print_next(
        ["generate", args.base, "--tuned", str(written), "--prompts", "prompts.txt", "--out", "images"],
        *export_commands(str(written), args.base),
    )
