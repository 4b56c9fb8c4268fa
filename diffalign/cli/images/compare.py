"""`diffalign compare`: the table of `evaluate` for existing image folders.

A folder of images has a `manifest.jsonl`, which `diffalign generate` writes: file, prompt and seed of each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign.cli.common import device_of, named_paths, overwrite_argument, path, writable
from diffalign.cli.images.options import FOLDER_HELP, judging_arguments, scorer_arguments
from diffalign.cli.images.pages import PAGE_HELP, PAGE_OPTIONS, check_page, page_arguments, write_page
from diffalign.cli.labels import by_eye
from diffalign.cli.next_steps import print_next
from diffalign.errors import DiffalignError

# options that votes do not have
SCORED = ("--scorer", "--device", "--faithfulness", "--tie", "--overwrite", "--page", *PAGE_OPTIONS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The base's folder, others by name, judges."""
    parser.add_argument("base", type=path, help=FOLDER_HELP)
    parser.add_argument(
        "others",
        nargs="+",
        metavar="NAME=FOLDER",
        help=("images of the same prompts and seeds; give NAME again for runs that differ in their training seed"),
    )
    scorer_arguments(parser, "may be repeated", unless="--blind")
    judging_arguments(parser)
    page_arguments(parser, PAGE_HELP)
    parser.add_argument("--out", type=path, help="folder for result.json, table.txt, scores.jsonl and grid.png")
    overwrite_argument(parser)
    parser.add_argument("--blind", action="store_true", help="vote on a page in the browser; --out has the votes")
    by_eye.by_eye_arguments(parser, "--blind")
    parser.add_argument(
        "--pairs-out",
        type=path,
        metavar="PAIRS",
        help="with --blind: also write the votes as preference pairs, to a .parquet or .jsonl file or a new folder",
    )


def run(args: argparse.Namespace) -> None:
    """Prints the table of `evaluate` for existing images, or that of votes."""
    by_eye.only_with(args, "--blind", args.blind, SCORED if args.blind else (*by_eye.NEEDS_PAGE, "--pairs-out"))
    if args.blind:
        _vote(args)
        return
    from diffalign.evaluation.compare import compare
    from diffalign.evaluation.evaluate import RESULT_FILES, write_result
    from diffalign.evaluation.manifest import read_image_manifest
    from diffalign.evaluation.report import BASE
    from diffalign.evaluation.scoring import Scoring, load_judges

    if not args.scorer:
        raise DiffalignError("give --scorer NAME, or vote with --blind")
    others = _others(args)
    if args.out is not None:
        writable([("--out", args.out / file) for file in RESULT_FILES], args.overwrite)
    check_page(args)
    base = read_image_manifest(args.base, complete=True)
    runs = {
        name: [read_image_manifest(folder, complete=True) for folder in folders] for name, folders in others.items()
    }
    judges = load_judges(Scoring(args.scorer, args.faithfulness, args.tie), device_of(args.device))
    result, rows = compare(base, runs, judges)
    print(result.table())
    if args.out is not None:
        write_result(args.out, result, rows, {BASE: base, **{name: some[0] for name, some in runs.items()}})
        print(f"{args.out}: result.json, table.txt, scores.jsonl, grid.png")
    if args.page is not None:
        write_page(args, result, rows, {BASE: [base], **runs})


def _others(args: argparse.Namespace) -> dict[str, list[str]]:
    """The folders of each name. Raises DiffalignError for the base's name."""
    from diffalign.evaluation.report import BASE

    others = named_paths(args.others, "")
    if BASE in others:
        raise DiffalignError(f"{BASE}=…: that is the first folder's name; give another")
    return others


def _vote(args: argparse.Namespace) -> None:
    """Serves the page, and prints the table of all votes in the folder when everything is judged."""
    from diffalign.evaluation.by_eye import export
    from diffalign.evaluation.by_eye.outcome import read_outcome
    from diffalign.evaluation.by_eye.sources import from_models
    from diffalign.evaluation.by_eye.votes import read_votes

    if args.out is None:
        raise DiffalignError("--blind needs --out FOLDER, where the votes are stored")
    pairs: Path | None = args.pairs_out
    if pairs is not None:
        export.check_labelled_out(pairs, args.out)
        writable([("--pairs-out", pairs)] if pairs.suffix else [], export.is_ours(pairs, args.out))
    others = _others(args)
    for name, folders in others.items():
        if len(folders) > 1:
            raise DiffalignError(f"'{name}' has {len(folders)} folders; with --blind, give each a name of its own")
    material = from_models(args.base, {name: folder for name, (folder,) in others.items()}, by_eye.selection(args))

    def result() -> str:
        found = read_outcome(args.out)
        text = found.text() + ("" if found.done else "\n\nthe table comes when everything is judged")
        labels = export.labels(read_votes(args.out))
        if pairs is None or not {"first", "second"} & set(labels.values()):
            return text + ("" if pairs is None else f"\n\nno pair has a preferred image yet; {pairs} is not written")
        written = export.write_labelled(pairs, material, labels)
        export.remember(pairs, args.out)
        return f"{text}\n\n{pairs}: {written}\nin a config: data.path={pairs}"

    by_eye.judge(args, material, args.out, result)
    print_next(
        ["votes", str(args.out)], *([["data", "check", str(pairs)]] if pairs is not None and pairs.exists() else [])
    )
