"""`diffalign data check` and `data report`: what is usable in a data set, in the terminal and as a page."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffalign.cli.common import column_names, count, overwrite_argument, path, path_text, writable
from diffalign.cli.next_steps import print_next
from diffalign.errors import DiffalignError
from diffalign.io.files import save_text

if TYPE_CHECKING:
    from diffalign.data.spec import DataSpec
    from diffalign.data.table.report import Report


def add_check(actions: Any) -> None:
    """Both actions and their options."""
    sub = actions.add_parser("check", help="how many pairs are usable, why the others are not, sizes, a sample")
    pairs_arguments(sub)
    _check_arguments(sub)
    sub.add_argument("--sample", type=path, metavar="PNG", help="write a contact sheet of a few pairs")
    sub.add_argument("--json", type=path, metavar="FILE", help="write the report, with every problem, as JSON")
    overwrite_argument(sub)
    sub = actions.add_parser("report", help="the same as a page: distributions, a contact sheet, the worst pairs")
    pairs_arguments(sub)
    _check_arguments(sub)
    sub.add_argument("--out", type=path, required=True, metavar="HTML", help="the page, one file without network")
    sub.add_argument(
        "--against",
        type=path_text,
        nargs="+",
        default=[],
        metavar="PAIRS",
        help="pairs that should share nothing with it",
    )
    overwrite_argument(sub)


def _check_arguments(sub: argparse.ArgumentParser) -> None:
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


def pairs_arguments(sub: argparse.ArgumentParser) -> None:
    """Which pairs, and how they are read."""
    sub.add_argument("path", type=path_text, help="file, folder or Hub id")
    sub.add_argument("--format", default="auto", help="of the rows (default: recognised from the files)")
    sub.add_argument("--split", default="train", help="of a Hub data set (default: %(default)s)")
    sub.add_argument(
        "--columns", nargs="*", default=[], metavar="PART=COLUMN", help=("column names that differ, e.g. prompt=text")
    )
    sub.add_argument("--max-pairs", type=count, help="examine at most this many usable pairs")


def spec_of(args: argparse.Namespace) -> DataSpec:
    """How the pairs are read, by the options of `pairs_arguments`; images of remote shards are not fetched."""
    from diffalign.data.spec import DataSpec, is_remote

    names = column_names(args.columns)
    found = DataSpec(format=args.format, split=args.split, columns=names, max_pairs=args.max_pairs)
    return replace(found, verify="none") if is_remote(args.path) else found


def check(args: argparse.Namespace) -> None:
    """Runs one of the two."""
    if args.action == "report":
        _write_page(args)
        return
    writable([("--sample", args.sample), ("--json", args.json)], args.overwrite)
    report = _checked(args, args.path, args.scores)
    print(report.text())
    if args.sample is not None:
        report.contact_sheet(args.sample)
        print(f"sample: {args.sample}")
    if args.json is not None:
        save_text(args.json, json.dumps(report.json(), indent=2) + "\n")
    if report.usable:
        _print_use(args)


def _write_page(args: argparse.Namespace) -> None:
    from diffalign.pages.data_page import write_data_page

    if args.out.suffix != ".html":
        raise DiffalignError(f"--out {args.out}: the page is one .html file; name it {args.out.stem}.html")
    writable([("--out", args.out)], args.overwrite)
    report = _checked(args, args.path, args.scores)
    others = [_checked(args, place) for place in args.against]
    size = write_data_page(args.out, report, others)
    print(f"{args.out}: {report.usable} pairs, {size / 1e6:.1f} MB; open it in a browser")


def _checked(args: argparse.Namespace, place: str, scores: Sequence[str] = ()) -> Report:
    from diffalign.config.data_sections import BucketsSection
    from diffalign.data.table.report import check_pairs
    from diffalign.data.table.score_aggregation import Axis

    buckets = None
    if args.aspect_buckets is not None:
        if args.resolution is None:
            raise DiffalignError("--aspect-buckets needs --resolution, the side of the square in pixels")
        section = BucketsSection(table=args.aspect_buckets)
        buckets = section.name(), section.sizes(args.resolution)
    return check_pairs(
        place,
        replace(spec_of(args), verify="full") if args.full else spec_of(args),
        resolution=args.resolution,
        buckets=buckets,
        axes=[Axis(file, file) for file in scores],
        aggregate=args.aggregate,
    )


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
