"""What the commands with a config share: their arguments, and a run that is built only to be measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from diffalign.cli.common import overwrite_argument, path
from diffalign.errors import DiffalignError
from diffalign.io.files import save_text

if TYPE_CHECKING:
    from diffalign.config.schema import Config
    from diffalign.training.build import Run


def config_arguments(parser: argparse.ArgumentParser) -> None:
    """The config and its overrides."""
    parser.add_argument("config", type=path, help="YAML file; `diffalign list configs` shows the packaged ones")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="overrides, e.g. training.learning_rate=1e-5 objective.beta=2000",
    )


def json_arguments(parser: argparse.ArgumentParser) -> None:
    """A file for the results."""
    parser.add_argument("--json", type=path, help="also write the results to this file")
    overwrite_argument(parser)


def write_json(args: argparse.Namespace, values: Any) -> None:
    """Writes the results where a file was named."""
    if args.json is not None:
        save_text(args.json, json.dumps(values, indent=2) + "\n")


def load_objective_config(args: argparse.Namespace, needs: str) -> Config:
    """The config of a run with an objective. Raises DiffalignError for a preference model's; `needs` says why."""
    from diffalign.config.schema import PreferenceModelConfig, load_config

    config = load_config(args.config, args.overrides, ["training.report_to=none"])
    if isinstance(config, PreferenceModelConfig):
        raise DiffalignError(f"the run of a preference model has no objective{needs}; give a config with an objective")
    return config


def dry_config(config: Config, folder: str) -> Config:
    """The config for a dry run: it fills no cache, and pairs that it generates go to `folder`."""
    data = {"cache_dir": None, "cache_variants": 1, "cache_trajectories": False, "cache_reference_errors": False}
    return config.model_copy(update={"data": config.data.model_copy(update=data), "output_dir": folder})


@contextmanager
def built_run(config: Config) -> Iterator[Run]:
    """The run of a config, built to be measured: nothing of it stays on disk."""
    from diffalign.training.build import build
    from diffalign.training.processes import make_accelerator
    from diffalign.training.remedies import with_remedies

    with TemporaryDirectory() as folder, with_remedies(config):
        yield build(dry_config(config, folder), make_accelerator(config))
