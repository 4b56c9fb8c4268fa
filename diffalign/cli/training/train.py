"""`diffalign train`: tune a model, or train a preference model, with a config."""

from __future__ import annotations

import argparse

from diffalign.cli.training.options import config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config and its overrides."""
    config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Trains to the end, from the configured checkpoint if there is one."""
    from diffalign.config.schema import load_config
    from diffalign.training.run import run_training

    run_training(load_config(args.config, args.overrides))
