"""`diffalign evaluate`: tuned models beside their base on the same prompts and seeds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffalign.cli.common import named_paths, path_text, scorer
from diffalign.cli.images.options import given_sampling, given_user, judging_arguments, sampling_arguments
from diffalign.cli.images.pages import PAGE_HELP, check_page, page_arguments, write_page
from diffalign.cli.next_steps import card_commands, export_commands, print_next
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.evaluation.recipe import Tuned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Base, tuned models by name, scorers, and sampling."""
    parser.add_argument(
        "base", type=path_text, help=("the base that the tuned models were tuned from: folder, Hub id or single file")
    )
    parser.add_argument(
        "--tuned",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a tuned model; give the same NAME again for runs that differ in their seed",
    )
    parser.add_argument(
        "--negative-tuned",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=("weights of the unconditional branch for NAME; without --tuned NAME=… the other branch uses the base"),
    )
    parser.add_argument(
        "--scorer", type=scorer, action="append", required=True, help="`diffalign list scorers`; may be repeated"
    )
    judging_arguments(parser)
    sampling_arguments(parser)
    page_arguments(parser, PAGE_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --page")


def run(args: argparse.Namespace) -> None:
    """Generates the images, scores them and prints the table."""
    from diffalign.data.table.prompts import read_prompts
    from diffalign.evaluation.evaluate import evaluation
    from diffalign.evaluation.scoring import Scoring

    if not args.tuned and not args.negative_tuned:
        raise DiffalignError("nothing to compare with the base: give --tuned NAME=PATH, e.g. --tuned dpo=runs/dpo")
    models = _models(
        named_paths(args.tuned, "--tuned"), named_paths(args.negative_tuned, "--negative-tuned"), given_user(args)
    )
    check_page(args)
    found = evaluation(
        args.base,
        models,
        read_prompts(args.prompts, limit=args.limit),
        args.seeds,
        scorers=Scoring(args.scorer, args.faithfulness, args.tie),
        out_dir=args.out,
        sampling=given_sampling(args),
    )
    print(found.result.table())
    print(f"{args.out}: result.json, table.txt, scores.jsonl, grid.png, images/")
    if args.page is not None:
        write_page(args, found.result, found.rows, found.images)
    runs = [str(one.path) for some in models.values() for one in some if one.path is not None]
    if runs:
        print_next(*export_commands(runs[0], args.base), *card_commands(runs[0], str(args.out)))


def _models(
    tuned: Mapping[str, list[str]], negative: Mapping[str, list[str]], user: list[float] | None
) -> dict[str, list[Tuned]]:
    """The weights of every run by the model's name; a name without --tuned is the base with a negative branch.

    Raises DiffalignError where a name has several of both and their numbers differ.
    """
    from diffalign.evaluation.recipe import Tuned

    models = {}
    for name in dict.fromkeys((*tuned, *negative)):
        paths: list[str | None] = [*tuned.get(name, [])] or [None]
        away: list[str | None] = [*negative.get(name, [])] or [None]
        if len(paths) != len(away) and len(paths) > 1 < len(away):
            raise DiffalignError(
                f"'{name}' has {len(paths)} tuned weights and {len(away)} negative ones; give one negative for all "
                "runs, or one for each"
            )
        count = max(len(paths), len(away))
        runs = zip(paths * (count // len(paths)), away * (count // len(away)), strict=True)
        models[name] = [Tuned(path, other, user if path else None) for path, other in runs]
    return models
