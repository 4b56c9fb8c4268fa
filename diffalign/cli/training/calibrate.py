"""`diffalign calibrate`: which beta and which learning rate fit a config's model and pairs."""

from __future__ import annotations

import argparse
import textwrap

from diffalign.cli.common import count, whole, writable
from diffalign.cli.next_steps import print_next
from diffalign.cli.training.options import (
    built_run,
    config_arguments,
    json_arguments,
    load_objective_config,
    write_json,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Config, how much is measured, file for the results."""
    config_arguments(parser)
    parser.add_argument("--steps", type=whole(2, 4096), default=16, help="optimiser steps, a power of two (default 16)")
    parser.add_argument("--pairs", type=count, default=128, help="pairs used for measuring (default 128)")
    json_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Prints what was measured and what follows for the config."""
    from diffalign.training.inspect.calibrate import calibratable, calibrate
    from diffalign.training.inspect.calibration_report import calibration_values, report

    writable([("--json", args.json)], args.overwrite)
    config = load_objective_config(args, needs=", and so no beta to calibrate")
    calibratable(config)  # before a model is loaded
    with built_run(config) as built:
        found = calibrate(built, args.steps, args.pairs)
    print(_wrapped(report(found)))
    write_json(args, calibration_values(found))
    print_next(["train", str(args.config), *args.overrides, *found.overrides])


def _wrapped(text: str, width: int = 80) -> str:
    """Sentences in lines of at most `width` characters; the table's rows and the overrides stay whole."""
    lines = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        lines.append(
            textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        )
    return "\n".join(lines)
