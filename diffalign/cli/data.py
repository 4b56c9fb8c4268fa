"""`diffalign data …`: check, score, rank, relabel, convert, split and write pairs, lists and prompt sets."""

from __future__ import annotations

import argparse
from typing import Literal

from diffalign.cli.common import (
    LAST_SEED,
    device,
    device_of,
    overwrite_argument,
    path,
    scorer,
    whole,
    writable,
)
from diffalign.cli.next_steps import print_next
from diffalign.cli.pairs.check import add_check, check, pairs_arguments, spec_of
from diffalign.cli.pairs.lists import add_lists, write_lists
from diffalign.cli.pairs.rewrite import add_rewrites, rewrite_pairs
from diffalign.cli.training.doubtful import add_doubtful, write_doubtful
from diffalign.cli.training.relabel import add_relabel, relabel_pairs
from diffalign.errors import DiffalignError
from diffalign.io.files import save_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_check(actions)
    sub = actions.add_parser("score", help=("score both images of every pair, into a file for data.scores"))
    pairs_arguments(sub)
    sub.add_argument("--scorer", type=scorer, required=True, help="`diffalign list scorers`")
    sub.add_argument(
        "--out", type=path, required=True, metavar="JSONL", help=("file of scores; an interrupted run continues")
    )
    sub.add_argument("--device", type=device, help="default: cuda where there is one")
    add_doubtful(actions)
    add_relabel(actions)
    add_rewrites(actions)
    add_lists(actions)
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


def _score_pairs(args: argparse.Namespace) -> None:
    from diffalign.data.table.open import open_pairs
    from diffalign.data.table.scores import score_pairs
    from diffalign.rewards import load_scorer, span_of

    table = open_pairs(args.path, spec_of(args))
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
    if args.action == "lists":
        write_lists(args)
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
    check(args)
