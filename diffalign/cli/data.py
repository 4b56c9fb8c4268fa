"""`diffalign data check | score | doubtful | relabel | world | prompts`: check, score, rank, relabel, write pairs."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from diffalign.cli.common import (
    LAST_SEED,
    column_names,
    count,
    device,
    device_of,
    overwrite_argument,
    path,
    path_text,
    scorer,
    whole,
    writable,
)
from diffalign.cli.next_steps import print_next
from diffalign.cli.pairs.rewrite import add_rewrites, rewrite_pairs
from diffalign.cli.training.doubtful import add_doubtful, write_doubtful
from diffalign.cli.training.relabel import add_relabel, relabel_pairs
from diffalign.errors import DiffalignError
from diffalign.io.files import save_text

if TYPE_CHECKING:
    from diffalign.data.spec import DataSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    sub = actions.add_parser("check", help="how many pairs are usable, why the others are not, sizes, a sample")
    _pairs_arguments(sub)
    sub.add_argument(
        "--scores", type=path_text, nargs="+", default=[], metavar="FILE", help=("files of scores, as in data.scores")
    )
    sub.add_argument("--aggregate", choices=("sum", "min", "all_agree"), default="sum", help="as data.aggregate")
    sub.add_argument("--full", action="store_true", help="decode every image instead of reading headers")
    sub.add_argument("--resolution", type=count, help="count the images that are smaller than this")
    sub.add_argument(
        "--aspect-buckets",
        choices=("sdxl", "kohya"),
        help="count the pairs of each bucket at --resolution, as data.aspect_buckets",
    )
    sub.add_argument("--sample", type=path, metavar="PNG", help="write a contact sheet of a few pairs")
    sub.add_argument("--json", type=path, metavar="FILE", help="write the report, with every problem, as JSON")
    overwrite_argument(sub)
    sub = actions.add_parser("score", help=("score both images of every pair, into a file for data.scores"))
    _pairs_arguments(sub)
    sub.add_argument("--scorer", type=scorer, required=True, help="`diffalign list scorers`")
    sub.add_argument(
        "--out", type=path, required=True, metavar="JSONL", help=("file of scores; an interrupted run continues")
    )
    sub.add_argument("--device", type=device, help="default: cuda where there is one")
    add_doubtful(actions)
    add_relabel(actions)
    add_rewrites(actions)
    sub = actions.add_parser("world", help="write preference pairs of the embedded world")
    sub.add_argument("out", type=path, help="FILE.parquet (Pick-a-Pic columns), or a folder for chosen/ and rejected/")
    sub.add_argument("--pairs", type=whole(1, 10**7), default=1024)
    sub.add_argument("--seed", type=whole(0, LAST_SEED), default=0)
    sub.add_argument(
        "--source",
        choices=("renders", "samples"),
        default="renders",
        help="samples: best and worst of four samples of the base",
    )
    sub.add_argument(
        "--reward",
        choices=("world", "world-size"),
        default="world",
        help=("the reward that decides which image is better"),
    )
    sub.add_argument(
        "--users",
        type=whole(0, 10**6),
        default=0,
        help=("number of users with different tastes; 0: all have the same preference"),
    )
    sub.add_argument("--shuffle-labels", action="store_true", help=("random labels: a control that must gain nothing"))
    overwrite_argument(sub)
    sub = actions.add_parser("prompts", help="write a named prompt set to a file")
    sub.add_argument("set", help="a name of `diffalign list prompts`, or a part, e.g. hpdv2:photo")
    sub.add_argument("--out", type=path, required=True, metavar="JSONL", help="file for --prompts")
    overwrite_argument(sub)


def _pairs_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", type=path_text, help="file, folder or Hub id")
    sub.add_argument("--format", default="auto", help="of the rows (default: recognised from the files)")
    sub.add_argument("--split", default="train", help="of a Hub data set (default: %(default)s)")
    sub.add_argument(
        "--columns", nargs="*", default=[], metavar="PART=COLUMN", help=("column names that differ, e.g. prompt=text")
    )
    sub.add_argument("--max-pairs", type=count, help="examine at most this many usable pairs")


def _score_pairs(args: argparse.Namespace) -> None:
    from diffalign.data.table.open import open_pairs
    from diffalign.data.table.scores import score_pairs
    from diffalign.rewards import load_scorer, span_of

    table = open_pairs(args.path, _spec(args))
    table.require_usable()
    judge = load_scorer(args.scorer, device_of(args.device))
    scored, unreadable = score_pairs(
        table, args.scorer, lambda *of: judge.score(*of).tolist(), args.out, span_of(judge)
    )
    print(f"{args.out}: {len(table)} pairs, {scored} of them scored now, {unreadable} with an image that does not open")
    print(f"in a config: data.scores={args.out}   (data.relabel=true lets the scores decide which image is chosen)")


def _write_prompts(args: argparse.Namespace) -> None:
    from diffalign.data.prompt_sets.fetch import as_listing, set_prompts, text_hash
    from diffalign.data.prompt_sets.known import SETS, named

    if args.out.suffix != ".jsonl":
        raise DiffalignError(f"--out {args.out}: prompts are written as .jsonl; name the file {args.out.stem}.jsonl")
    if (found := named(args.set)) is None:
        raise DiffalignError(f"no prompt set is called {args.set!r}; known: {', '.join(SETS)}")
    writable([("--out", args.out)], args.overwrite)
    prompts = set_prompts(*found)
    save_text(args.out, as_listing(prompts))
    print(f"{args.out}: {len(prompts)} prompts, SHA-256 of the text {text_hash(prompts)}")


def run(args: argparse.Namespace) -> None:
    """Runs one of the actions."""
    if args.action == "score":
        _score_pairs(args)
        return
    if args.action == "doubtful":
        write_doubtful(args)
        return
    if args.action == "relabel":
        relabel_pairs(args)
        return
    if args.action in ("convert", "split", "dedupe"):
        rewrite_pairs(args)
        return
    if args.action == "prompts":
        _write_prompts(args)
        return
    if args.action == "world":
        from diffalign.world.pairs import PairRecipe, write_pairs

        recipe = PairRecipe(
            args.pairs, args.seed, args.source, args.reward, shuffle_labels=args.shuffle_labels, users=args.users
        )
        layout: Literal["parquet", "folder"] = "parquet" if args.out.suffix == ".parquet" else "folder"
        write_pairs(args.out, recipe, layout=layout, overwrite=args.overwrite)
        print(f"{args.pairs} pairs in {args.out}")
        print_next(["data", "check", str(args.out)])
        return

    writable([("--sample", args.sample), ("--json", args.json)], args.overwrite)
    from diffalign.config.data_sections import BucketsSection
    from diffalign.data.table.report import check_pairs
    from diffalign.data.table.score_aggregation import Axis

    buckets = None
    if args.aspect_buckets is not None:
        if args.resolution is None:
            raise DiffalignError("--aspect-buckets needs --resolution, the side of the square in pixels")
        section = BucketsSection(table=args.aspect_buckets)
        buckets = section.name(), section.sizes(args.resolution)
    report = check_pairs(
        args.path,
        replace(_spec(args), verify="full" if args.full else "header"),
        resolution=args.resolution,
        buckets=buckets,
        axes=[Axis(file, file) for file in args.scores],
        aggregate=args.aggregate,
    )
    print(report.text())
    if args.sample is not None:
        report.contact_sheet(args.sample)
        print(f"sample: {args.sample}")
    if args.json is not None:
        save_text(args.json, json.dumps(report.json(), indent=2) + "\n")
    if report.usable:
        _print_use(args)


def _print_use(args: argparse.Namespace) -> None:
    """What comes next: `init`, or the keys of a config where options say how the pairs are read (init has none)."""
    from diffalign.config.strict_yaml import quoted

    columns = ", ".join(f"{quoted(part)}: {quoted(column)}" for part, column in column_names(args.columns).items())
    keys = {
        "format": args.format != "auto" and quoted(args.format),
        "split": args.split != "train" and quoted(args.split),
        "columns": columns and f"{{{columns}}}",
        "scores": args.scores and f"[{', '.join(map(quoted, args.scores))}]",
        "aggregate": args.aggregate != "sum" and args.aggregate,
    }
    words = [f"data.{key}={value}" for key, value in keys.items() if value]
    if words:
        print(f"in a config: {shlex.join([f'data.path={quoted(args.path)}', *words])}")
    else:
        print_next(["init", "my.yaml", "--pairs", args.path])


def _spec(args: argparse.Namespace) -> DataSpec:
    from diffalign.data.spec import DataSpec

    return DataSpec(format=args.format, split=args.split, columns=column_names(args.columns), max_pairs=args.max_pairs)
