"""`diffalign votes`: what the votes of `label --by-eye` and `compare --blind` say."""

from __future__ import annotations

import argparse

from diffalign.cli.common import overwrite_argument, path, writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder of votes."""
    parser.add_argument("folder", type=path, help="folder of votes: --votes of `label`, --out of `compare --blind`")
    parser.add_argument(
        "--reveal", action="store_true", help="print the table of a blind comparison before everything is judged"
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="write everything as JSON, the table included")
    overwrite_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Prints progress, agreement and, where everything is judged or with --reveal, the table."""
    from diffalign.evaluation.by_eye.outcome import read_outcome

    writable([("--json", args.json)], args.overwrite)
    found = read_outcome(args.folder)
    print(found.text(reveal=args.reveal))
    if found.kind == "blind" and not (found.done or args.reveal):
        print("\nthe table comes when everything is judged; --reveal prints it now")
    if args.json is not None:
        args.json.write_text(found.to_json(), encoding="utf-8")
        print(f"{args.json}: the same as JSON")
