"""`diffalign train`: tune a model, or train a preference model, with a config."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from diffalign.cli.next_steps import print_next, scorer_for
from diffalign.cli.training.options import config_arguments

if TYPE_CHECKING:
    from diffalign.config.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config and its overrides."""
    config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Trains to the end, from the configured checkpoint if there is one."""
    from diffalign.config.schema import Config, load_config
    from diffalign.training.callbacks.run_page import print_summary
    from diffalign.training.run import run_training

    config = load_config(args.config, args.overrides)
    run_training(config)
    print_summary(config)
    if isinstance(config, Config) and os.environ.get("RANK", "0") == "0":
        base, out = str(config.model.pretrained_model_name_or_path), config.output_dir
        sampling = [*sampled_as(config), "--prompts", "prompts.txt", "--seeds", "0-3"]
        tuned = ["--tuned", f"{config.objective.name}={out}"]
        print_next(
            ["generate", base, "--tuned", out, *sampling, "--out", f"{out}/images"],
            ["evaluate", base, *tuned, *sampling, "--scorer", scorer_for(base), "--out", f"{out}/evaluation"],
        )


def sampled_as(config: Config) -> list[str]:
    """The options of `generate` and `evaluate` without which they would not sample from the model that was trained."""
    model, options = config.model, []
    if model.pretrained_vae_model_name_or_path is not None:
        options += ["--vae", str(model.pretrained_vae_model_name_or_path)]
    if model.prediction_type is not None:
        options += ["--prediction-type", model.prediction_type]
    for path, weight in model.merge_lora.items():
        options += ["--merge-lora", f"{path}={weight:g}"]
    for name, value in ({} if model.scheduler is None else model.scheduler.given).items():
        options += ["--scheduler-config", f"{name}={str(value).lower()}"]
    for name, value in model.text.recorded.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    if config.tuning.needs_users:
        options += ["--users", str(config.data.users or "users.json"), "--user", str(config.validation.user or "ID")]
    return options
