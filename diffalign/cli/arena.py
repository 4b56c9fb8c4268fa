"""`diffalign arena`: every objective side by side on the embedded world."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import Any

from diffalign.cli.common import LAST_SEED, path, whole
from diffalign.errors import DiffalignError
from diffalign.io.folder_lock import folder_lock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--out", type=path, default=Path("runs/arena"), help=("output folder; finished runs in it are reused")
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="one training seed, fewer steps: the README's table")
    kind.add_argument("--sweep", action="store_true", help=("search learning rates and scales again, on other prompts"))
    parser.add_argument("--only", nargs="+", metavar="ENTRY", help="only these entries")
    parser.add_argument(
        "--keep",
        type=path,
        metavar="FILE",
        help="result.json of an earlier arena: its lines stay for entries not run",
    )
    parser.add_argument("--seeds", type=whole(0, LAST_SEED), nargs="+", help="training seeds (default: the protocol's)")
    parser.add_argument(
        "--workers", type=whole(1, 1024), default=os.cpu_count() or 1, help="parallel runs (default: cores)"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command and prints the tables."""
    from diffalign.arena.plots import require_matplotlib

    if args.workers < 1:
        raise DiffalignError(f"--workers {args.workers}: must be at least 1")
    require_matplotlib()
    with folder_lock(args.out, "an arena"):
        _start(args)


def _start(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from diffalign.arena.arena import run_arena, tables
    from diffalign.arena.entries import FULL, QUICK, TUNED, entries, tuned_settings
    from diffalign.arena.folder import ArenaFolder
    from diffalign.arena.sweep import save_sweep, sweep_settings

    taking_part = entries(None if args.only is None else tuple(args.only))
    arena, command = ArenaFolder(args.out, args.workers), _command(args)
    if args.sweep:
        if args.seeds is not None:
            raise DiffalignError("--seeds: the sweep has its own seeds; remove --seeds")
        if args.keep is not None:
            raise DiffalignError("--keep: a sweep writes no lines; remove --keep")
        methods = [entry for entry in taking_part if not entry.control]
        file = args.out / Path(TUNED).name
        known = json.loads(file.read_text()) if file.is_file() else None
        save_sweep(sweep_settings(arena, methods, command, known=known), file)
        print(f"{file}: all trials and the chosen settings; the packaged file is {TUNED}")
        return
    protocol = QUICK if args.quick else FULL
    if args.seeds is not None:
        seeds = tuple(args.seeds)
        protocol = replace(protocol, seeds=seeds, forwards_seeds=seeds[: len(protocol.forwards_seeds)])
    found = run_arena(arena, taking_part, protocol, tuned_settings(), command, _earlier(args.keep))
    print(tables(found))
    print(f"{args.out}: arena.html (everything on one page), leaderboard.png, leaderboard.md, result.json")


def _earlier(file: Path | None) -> dict[str, Any] | None:
    """The record in a file. Raises DiffalignError where the file holds none."""
    if file is None:
        return None
    if not file.is_file():
        raise DiffalignError(f"--keep {file}: no such file; it takes the result.json of an earlier arena")
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        if {"environment", "protocol", "views"} <= found.keys():
            return found
    except (ValueError, AttributeError):
        pass
    raise DiffalignError(f"--keep {file}: not the result.json of an arena")


def _command(args: argparse.Namespace) -> str:
    """The command line that reproduces the result, without options that do not change it."""
    words = ["diffalign", "arena"]
    words += ["--quick"] * args.quick + ["--sweep"] * args.sweep
    words += ["--only", *args.only] if args.only else []
    words += ["--seeds", *map(str, args.seeds)] if args.seeds else []
    words += ["--keep", args.keep.name] if args.keep else []
    return shlex.join(words)
