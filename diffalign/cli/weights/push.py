"""`diffalign push`: weights, card and settings of a run to the Hugging Face Hub."""

from __future__ import annotations

import argparse

from diffalign.cli.common import path_text
from diffalign.cli.next_steps import print_next


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Run, repository, visibility, consent."""
    parser.add_argument("tuned", metavar="RUN", type=path_text, help="output_dir of a run, or tuned weights")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME on the Hub")
    parser.add_argument("--yes", action="store_true", help="push; without it the files are only shown")
    parser.add_argument("--public", action="store_true", help="make or use a public repository (default: private)")
    parser.add_argument("--base", type=path_text, help="the base they were tuned from (default: the base of the run)")


def run(args: argparse.Namespace) -> None:
    """Shows the files, and with `--yes` uploads them. Raises ValueError for what cannot or must not be pushed."""
    from diffalign.export.card.write import CARD, stated_license
    from diffalign.export.push import push, push_files

    files = push_files(args.tuned, args.repo, args.base)
    for file in files:
        print(f"{_size(file.size):>10}  {file.name}")
        if file.changed:
            print(f"{'':>10}  without the folders of this machine in {', '.join(file.changed)}")
    print(f"{_size(sum(file.size for file in files)):>10}  in {len(files)} files")
    card = next(file for file in files if file.name == CARD)
    if stated_license(card.source) is None:
        print("the card states no licence: diffalign card RUN --license ID, or a line in its metadata")
    visibility = "public" if args.public else "private"
    if not args.yes:
        print(f"Nothing was pushed. {args.repo} would be a {visibility} repository.")
        print_next(["push", args.tuned, args.repo, *(["--public"] if args.public else []), "--yes"])
        return
    print(f"{push(files, args.repo, private=not args.public)}: pushed")


def _size(size: int) -> str:
    """Bytes for people."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
