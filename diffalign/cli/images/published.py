"""`diffalign published`: released checkpoints under one protocol, our figures beside those of their papers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli.common import named_paths, path_text, scorer
from diffalign.cli.images.options import given_sampling, sampling_arguments
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.evaluation.published.catalogue import Catalogue
    from diffalign.evaluation.published.run import PublishedRun

BASES = ("sd15", "sdxl")  # a test compares these with the packaged list
# SPO's and LPO's protocol, the one that is stated most fully
PROTOCOL = {"prompts": "pickapic-v1-validation", "steps": 20, "guidance": 5.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which base, which of its releases, scorers, and sampling."""
    parser.add_argument("base", nargs="?", choices=BASES, help="the base whose releases are evaluated")
    parser.add_argument("--list", action="store_true", help="print the list of weights and published figures")
    parser.add_argument("--dry-run", action="store_true", help="print what would be fetched and generated")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these releases alone")
    parser.add_argument("--model", type=path_text, help="the base's folder or another Hub id of it")
    parser.add_argument(
        "--tuned",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a local copy of a release, or weights of your own beside the releases",
    )
    parser.add_argument(
        "--scorer",
        type=scorer,
        action="append",
        help="`diffalign list scorers`; may be repeated (default: those of the tables)",
    )
    sampling_arguments(parser, {**PROTOCOL, "out": Path("published")})


def run(args: argparse.Namespace) -> None:
    """Prints the list or the plan, or evaluates and prints both kinds of figures."""
    from diffalign.evaluation.published.catalogue import catalogue
    from diffalign.evaluation.published.page import list_page
    from diffalign.evaluation.published.run import PublishedRun

    known = catalogue()
    if args.list:
        print(list_page(known), end="")
        return
    if args.base is None:
        raise DiffalignError(f"name a base, {' or '.join(BASES)}, or give --list")
    if args.users or args.user:
        raise DiffalignError("--users and --user: no release has users; use `diffalign evaluate` for your own weights")
    given = named_paths(args.tuned, "--tuned")
    if twice := [name for name, paths in given.items() if len(paths) > 1]:
        raise DiffalignError(f"--tuned {twice[0]}=… is given twice; give each model once, under a name of its own")
    tuned = {name: paths[0] for name, paths in given.items()}
    chosen = PublishedRun(args.base, args.only, args.model, tuned)
    names = chosen.chosen(known)  # unknown ones are an error before anything is fetched
    for release in known.unreadable(args.base):
        if release.name not in names:
            print(f"left out: {release.name} ({release.repository}), a pickle that is not loaded")
    if args.dry_run:
        _print_plan(args, chosen, known)
    else:
        _evaluate(args, chosen, known)


def _scorers(args: argparse.Namespace) -> list[str]:
    """The given scorers, or those that measure a column of the tables and are part of this version."""
    from diffalign.evaluation.published.catalogue import MEASURED_BY
    from diffalign.rewards import scorer_names

    return args.scorer or [
        name for name in dict.fromkeys(name for name, _ in MEASURED_BY.values()) if name in scorer_names()
    ]


def _evaluate(args: argparse.Namespace, chosen: PublishedRun, known: Catalogue) -> None:
    from diffalign.data.table.prompts import read_prompts
    from diffalign.evaluation.published.beside import as_table, verdicts
    from diffalign.evaluation.published.run import evaluate_published

    result, lines = evaluate_published(
        chosen,
        read_prompts(args.prompts, limit=args.limit),
        args.seeds,
        scorers=_scorers(args),
        out_dir=args.out,
        sampling=given_sampling(args),
        known=known,
    )
    print(result.table())
    print(f"\n{as_table(lines)}")
    for verdict in verdicts(lines, chosen.base, known):
        print(verdict)
    print(f"{args.out}: published.md, published.json, result.json, table.txt, scores.jsonl, grid.png, images/")


def _print_plan(args: argparse.Namespace, chosen: PublishedRun, known: Catalogue) -> None:
    """What is fetched, and how many images are generated; nothing is fetched for it, not even a prompt set."""
    from diffalign.data.prompt_sets.known import named
    from diffalign.data.table.prompts import read_prompts
    from diffalign.evaluation.published.page import LAYOUTS

    found = named(args.prompts)
    if found is None:
        count = len(read_prompts(args.prompts, limit=args.limit))
    else:
        count = min(found[0].part_rows[found[1]] if found[1] else found[0].rows, args.limit or 10**9)
    models = chosen.chosen(known)
    print(f"base  {chosen.model or known.bases[chosen.base].model}")
    for name, each in models.items():
        place = (
            each if isinstance(each, str) else f"{each.repository} ({LAYOUTS[each.layout]} {each.path}; {each.paper})"
        )
        print(f"      {name}: {place}")
    images = (1 + len(models)) * count * len(args.seeds)
    forwards = images * args.steps * (2 if args.guidance > 1 else 1)
    print(f"scorers: {', '.join(_scorers(args))}")
    print(
        f"{1 + len(models)} models x {count} prompts ({args.prompts}) x {len(args.seeds)} seed(s) = {images} images; "
        f"{args.scheduler}, {args.steps} steps, guidance {args.guidance:g}: {forwards} images through a UNet"
    )
