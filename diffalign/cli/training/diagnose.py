"""`diffalign diagnose`: an objective's gradient beside Diffusion-DPO's, before any step."""

from __future__ import annotations

import argparse

from diffalign.cli.common import count, writable
from diffalign.cli.training.options import (
    built_run,
    config_arguments,
    json_arguments,
    load_objective_config,
    write_json,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Config, number of batches, file for the results."""
    config_arguments(parser)
    parser.add_argument("--batches", type=count, default=8, help="micro-batches of the run's pairs (default 8)")
    json_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the table of angles and sizes."""
    from diffalign.training.inspect.gradient_check import diagnose, direction_values, directions_table

    writable([("--json", args.json)], args.overwrite)
    config = load_objective_config(args, needs=" to compare with Diffusion-DPO")
    with built_run(config) as built:
        found = diagnose(built, args.batches)
    print(directions_table(found))
    write_json(args, direction_values(found))
