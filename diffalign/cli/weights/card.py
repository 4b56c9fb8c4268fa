"""`diffalign card`: the model card of a run, with the evaluation that was made since."""

from __future__ import annotations

import argparse

from diffalign.cli.common import overwrite_argument, path, path_text
from diffalign.cli.next_steps import print_next, scorer_for
from diffalign.cli.training.train import sampled_as


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Run, evaluation, licence."""
    parser.add_argument(
        "tuned", metavar="RUN", type=path_text, help="output_dir of a run, or a folder with tuned weights"
    )
    parser.add_argument(
        "--evaluation",
        type=path,
        metavar="DIR",
        help="folder that `diffalign evaluate` wrote (default: the newest that measured these weights, in RUN, beside "
        "RUN or in the working folder)",
    )
    parser.add_argument(
        "--license", metavar="ID", help="licence of these weights, as the Hub names it: openrail++, apache-2.0, …"
    )
    parser.add_argument("--base", type=path_text, help="the base they were tuned from (default: the base of the run)")
    overwrite_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Writes README.md. Raises ValueError for an edited card and for an evaluation of other weights."""
    from diffalign.export.card.evaluation import find_evaluations, searched_in
    from diffalign.export.card.write import stated_license, write_run_card
    from diffalign.export.tuned_run import recorded_run

    tuned, evaluation = recorded_run(args.tuned, args.base), args.evaluation
    others: list[str] = []
    if evaluation is None and (found := find_evaluations(tuned)):
        evaluation, others = found[0].folder, [str(each.folder) for each in found[1:]]
    card = write_run_card(
        args.tuned, base=args.base, evaluation=evaluation, license=args.license, overwrite=args.overwrite
    )
    print(f"{card}: the model card")
    if evaluation is not None:
        more = f"; --evaluation DIR takes another: {', '.join(others)}" if others else ""
        print(f"  with the evaluation in {evaluation}{more}")
    if stated_license(card) is None:
        print("  without a licence: state one with --license")
    if evaluation is not None:
        print_next(["push", args.tuned, "OWNER/NAME"])
        return
    print("  without an evaluation: no folder of one that measured these weights is in")
    for place in searched_in(tuned):
        print(f"    {place}")
    print("  make one, or name its folder with --evaluation DIR")
    name, out = tuned.objective or "tuned", f"{args.tuned}/evaluation"
    base = tuned.base.pretrained_model_name_or_path
    sampling = [] if tuned.config is None else sampled_as(tuned.config)
    sampling += ["--prompts", "prompts.txt", "--seeds", "0-3", "--scorer", scorer_for(base)]
    print_next(
        ["evaluate", base, "--tuned", f"{name}={args.tuned}", *sampling, "--out", out],
        ["card", args.tuned, "--evaluation", out],
    )
