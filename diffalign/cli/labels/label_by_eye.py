"""`diffalign label --by-eye`: preference pairs from what people prefer on a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign.cli.common import count, path, path_text, writable
from diffalign.cli.labels import by_eye
from diffalign.cli.next_steps import print_next
from diffalign.errors import DiffalignError

OPTIONS = (
    *by_eye.NEEDS_PAGE,
    "--pairs",
    "--without",
    "--only",
    "--per-prompt",
    "--votes",
    "--labels-of",
    "--keep-unjudged",
    "--no-serve",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that need --by-eye."""
    by_eye.by_eye_arguments(parser, "--by-eye")
    group = parser.add_argument_group("what is judged and written, with --by-eye")
    group.add_argument("--pairs", type=path_text, help="label these pairs again, instead of folders; as data.path")
    group.add_argument("--without", nargs="+", metavar="COLUMN", help="columns of --pairs that are left out")
    group.add_argument(
        "--only", type=path, metavar="FILE", help="judge those of --pairs whose id is in this csv, e.g. doubtful ones"
    )
    group.add_argument("--per-prompt", type=count, help="pairs of each prompt (default: each image once)")
    group.add_argument(
        "--votes", type=path, metavar="FOLDER", help="of the votes (default: --out with .votes behind it)"
    )
    group.add_argument(
        "--labels-of", metavar="ANNOTATOR", help="write the labels of one annotator (default: majority of all)"
    )
    group.add_argument(
        "--keep-unjudged", action="store_true", help="write pairs of --pairs without a vote with their old label"
    )
    group.add_argument("--no-serve", action="store_true", help="only write the pairs from the votes")


def run(args: argparse.Namespace) -> None:
    """Serves the page, and writes the pairs that were judged so far when it ends."""
    from diffalign.evaluation.by_eye import export, sources
    from diffalign.evaluation.by_eye.outcome import read_outcome
    from diffalign.evaluation.by_eye.plan import store_plan
    from diffalign.evaluation.by_eye.votes import MAJORITY, read_votes

    _check(args)
    votes: Path = args.votes or args.out.with_name(f"{args.out.name}.votes")
    export.check_labelled_out(args.out, votes)
    if args.out.suffix:
        writable([("--out", args.out)], args.overwrite or export.is_ours(args.out, votes))
    if args.labels_of not in (None, MAJORITY, by_eye.annotator(args)):
        export.labels(read_votes(votes), args.labels_of)  # refused now where there are none, not after the last pair
    chosen, table = by_eye.selection(args, args.per_prompt), None
    if args.pairs:
        material, table = sources.from_pairs(args.pairs, chosen, without=args.without or (), only=args.only)
    else:
        material = sources.from_images(args.folders, chosen)

    def result() -> str:
        found = export.labels(read_votes(votes), args.labels_of or MAJORITY)
        said = read_outcome(votes).text()
        if not {"first", "second"} & set(found.values()):
            return f"{said}\n\nno pair has a preferred image yet; {args.out} is not written"
        written = export.write_labelled(args.out, material, found, table, keep=args.keep_unjudged)
        export.remember(args.out, votes)
        return f"{said}\n\n{args.out}: {written}\nin a config: data.path={args.out}"

    if args.no_serve:
        store_plan(votes, material.plan)
        print(result())
    else:
        by_eye.judge(args, material, votes, result)
    print_next(["votes", str(votes)], *([["data", "check", str(args.out)]] if args.out.exists() else []))


def _check(args: argparse.Namespace) -> None:
    """Raises DiffalignError for options that contradict each other."""
    if bool(args.folders) == bool(args.pairs):
        raise DiffalignError("give folders of images, or --pairs PATH to label existing pairs again")
    of_pairs = {"--without": args.without, "--only": args.only, "--keep-unjudged": args.keep_unjudged}
    for name, value in of_pairs.items():
        if value and not args.pairs:
            raise DiffalignError(f"{name} belongs to --pairs PATH")
    if args.per_prompt and args.pairs:
        raise DiffalignError("--per-prompt belongs to folders of images; of --pairs PATH every pair is judged")
