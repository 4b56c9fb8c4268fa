"""`diffalign check`: a dry run. Builds the run of a config, takes one small step, prints the plan."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from diffalign.cli.next_steps import print_next
from diffalign.cli.training.options import config_arguments, dry_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config and its overrides."""
    config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the plan and the step; `output_dir` and caches stay as they are."""
    from diffalign.config.schema import PreferenceModelConfig, load_config
    from diffalign.training.build import build
    from diffalign.training.inspect.dry_run import describe_run, dry_run
    from diffalign.training.open_data import enough_prompts
    from diffalign.training.optim.optimizers import effective_lr
    from diffalign.training.processes import make_accelerator, on_main
    from diffalign.training.remedies import with_remedies
    from diffalign.training.run import build_run, claim
    from diffalign.training.settle import settled, with_precision

    config = load_config(args.config, args.overrides, ["training.report_to=none"])
    accelerator = make_accelerator(config)
    config = with_precision(config, accelerator.device)
    claim(config)
    if isinstance(config, PreferenceModelConfig):
        with with_remedies(config):
            judge = build_run(config, accelerator)
            found = f"{judge.describe()}\n{judge.dry_run()}"
        if accelerator.is_main_process:
            print(found)
            print_next(["train", str(args.config), *args.overrides])
        accelerator.end_training()
        return
    changes: dict[str, Any] = {}
    if config.source is not None:
        changes["source"] = config.source.small()
        one = {"train_batch_size": 1, "gradient_accumulation_steps": 1}  # a step of one pair, so that one is enough
        changes["training"] = config.training.model_copy(update=one)
    with ExitStack() as stack, with_remedies(config):
        folder = on_main(accelerator, lambda: stack.enter_context(TemporaryDirectory()))
        built = build(dry_config(config.model_copy(update=changes), folder), accelerator)
        if config.source is not None:
            enough_prompts(config, len(built.table))  # of the source as it is, not of the small one
        planned = replace(
            built,
            config=settled(config, accelerator.device, built.base.family.name),
            lr=effective_lr(config.training, accelerator.num_processes),
        )
        if accelerator.is_main_process:
            print(describe_run(planned))
        tried = dry_run(planned)
        if accelerator.is_main_process:
            print(tried)
            print_next(["train", str(args.config), *args.overrides])
        accelerator.wait_for_everyone()  # the folder goes with the main process
    accelerator.end_training()
