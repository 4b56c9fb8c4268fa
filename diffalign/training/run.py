"""One run from config to final weights: its folder, its record, and the order of its parts."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import pkgutil
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffalign.config.health_section import HealthSection
from diffalign.config.schema import AnyConfig, Config, parse_config, save_config
from diffalign.config.sections import ValidationSection
from diffalign.config.strict_yaml import ConfigError, read_yaml
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.prompts import Table
from diffalign.errors import DiffalignError
from diffalign.export.card.facts import INPUTS, inputs_record
from diffalign.io.files import save_text
from diffalign.io.folder_lock import folder_lock
from diffalign.models.loading.base import Base
from diffalign.training.build import build
from diffalign.training.callbacks.base import Callback, check_callbacks
from diffalign.training.callbacks.checkpoints import Checkpoints
from diffalign.training.callbacks.memory import FreeMemory
from diffalign.training.callbacks.metrics_log import MetricsLog
from diffalign.training.callbacks.progress_bar import ProgressBar
from diffalign.training.callbacks.recovery import Health
from diffalign.training.callbacks.run_page import RunPage
from diffalign.training.callbacks.run_records import RunRecords
from diffalign.training.callbacks.signals import Stopping
from diffalign.training.callbacks.spending import SpendingLimit
from diffalign.training.callbacks.validation import Validation
from diffalign.training.checkpoints.checkpoint import find_checkpoint
from diffalign.training.checkpoints.final_weights import clear_output, has_final_weights
from diffalign.training.checkpoints.run_state import resume
from diffalign.training.distributed.shared_folder import check_shared
from diffalign.training.distributed.vital_signs import long_work
from diffalign.training.distributed.watch import Watch
from diffalign.training.heldout.callback import HeldOut
from diffalign.training.heldout.guards import Guards
from diffalign.training.heldout.stopping import EarlyStopping
from diffalign.training.loop import train
from diffalign.training.open_data import open_table, prepared
from diffalign.training.processes import make_accelerator, on_main
from diffalign.training.remedies import with_remedies
from diffalign.training.settle import with_precision
from diffalign.training.trainable import Run, Trainable

log = logging.getLogger(__name__)

PREFERENCE_RUNS = {  # by `preference_model.kind`
    "step_aware": "diffalign.contrib.step_aware.build:build_preference_run",
    "latent": "diffalign.contrib.latent_judge.build:build_latent_run",
}
NAMED = 5  # rows left out that are named at the start of a run
PACKAGES = ("diffalign", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "torchao", "xformers")


def run_training(
    config: AnyConfig,
    *,
    table: PairTable | None = None,
    base: Base | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, float]:
    """Runs a config to its end and returns the last logged metrics.

    table, base: open data and an open model, in place of those that the config names.
    callbacks: called besides the run's own (`training/callbacks/base.py`).

    Raises ConfigError when the output folder contains another run, FolderInUseError while another process trains there,
    DataError before any model is loaded, ResourceError where memory runs out. SIGINT and SIGTERM raise Interrupted once
    the current step is finished and a checkpoint is written.
    """
    callbacks = check_callbacks(callbacks)
    accelerator = make_accelerator(config)
    config = with_precision(config, accelerator.device)
    with own_folder(config, accelerator) as watch:
        return _trained(config, accelerator, [*callbacks, watch], base, table)


def _trained(
    config: AnyConfig,
    accelerator: Accelerator,
    callbacks: Sequence[Callback],
    base: Base | None,
    table: PairTable | None,
) -> dict[str, float]:
    """Its own function: the wrapped network is freed before its group of processes ends (`free_frames`)."""
    with long_work("building the run"):
        opened = open_table(config, accelerator) if table is None else prepared(config, table)
        if accelerator.is_main_process:
            report_rows(opened, config.data.path)
        run = build_run(config, accelerator, opened, base)
        start = resume(run)
    begin(run, start)
    values = train(run, start, run_callbacks(run, callbacks))
    if accelerator.is_main_process:
        print(run.usage())
        write_card(config)
    return values


def write_card(config: AnyConfig) -> None:
    """The model card beside the final weights. What stops it is logged: the weights are written, and count more."""
    if isinstance(config, Config):
        from diffalign.export.card.write import write_run_card

        try:
            write_run_card(config.output_dir)
        except Exception as error:  # also of the disk, or of an evaluation beside the run
            log.warning("no model card was written: %s: %s", type(error).__name__, error)


@contextlib.contextmanager
def own_folder(config: AnyConfig, accelerator: Accelerator) -> Iterator[Watch]:
    """Within the block the output folder is this run's alone, and errors for lack of memory name the run's settings.

    The main process takes the lock for all processes of the run, and all must see the folder; several processes watch
    each other. At the end trackers and processes are released.
    """
    output_dir = Path(config.output_dir)
    with contextlib.ExitStack() as stack, with_remedies(config):
        stack.callback(accelerator.end_training)

        def take() -> None:
            if not output_dir.is_file():  # claim names the file
                stack.enter_context(folder_lock(output_dir, "a training run"))
            claim(config)

        on_main(accelerator, take)
        check_shared(config, accelerator)
        try:
            with Watch(accelerator) as watch:
                yield watch
        except BaseException as error:
            if accelerator.num_processes > 1:
                free_frames(error)
            raise


def free_frames(error: BaseException) -> None:
    """Frees what the frames of a caught error still refer to, the wrapped network among it.

    PyTorch's gloo group waits for its threads when the last reference to it goes, and those wait for Python's lock: a
    network that is freed after `destroy_process_group` can stop its process for good.
    """
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    gc.collect()


def build_run(
    config: AnyConfig, accelerator: Accelerator, table: Table | None = None, base: Base | None = None
) -> Trainable:
    """Every part of a run of either kind. The core imports what trains a preference model only here, by its name.

    Raises DiffalignError for an open base with the config of a preference model, and what building a run raises.
    """
    if isinstance(config, Config):
        return build(config, accelerator, table, base)
    if base is not None:
        raise DiffalignError(
            f"base: a preference model is trained on the base that its config names, "
            f"{config.model.pretrained_model_name_or_path}, and {base.source!r} was given as an object; leave base out"
        )
    build_run_of_kind: Callable[..., Trainable] = pkgutil.resolve_name(PREFERENCE_RUNS[config.preference_model.kind])
    return build_run_of_kind(config, accelerator, open_table(config, accelerator) if table is None else table)


def run_callbacks(run: Trainable, callbacks: Sequence[Callback]) -> list[Callback]:
    """All callbacks of a run in order: rules first, then those of its caller, then what writes."""
    config, training = run.config, run.config.training
    health, validation = HealthSection(action="none"), ValidationSection()
    if isinstance(config, Config):
        health, validation = config.health, config.validation
    limit = training.max_unet_forwards
    heldout = guards = None
    if isinstance(run, Run) and run.heldout is not None:
        heldout = HeldOut(run, run.heldout)
        if validation.guards:
            guards = Guards(heldout, validation, run.guard_prompts, run.faithfulness)
    stops = heldout is not None and validation.stops_or_loads
    return [
        *([] if heldout is None else [heldout]),
        *([] if guards is None else [guards]),
        Health(run, health),
        *([EarlyStopping(run, validation, heldout, guards)] if heldout is not None and stops else []),
        *([] if limit is None else [SpendingLimit(limit)]),
        *callbacks,
        Stopping(run.accelerator),
        MetricsLog(training.logging_steps),
        RunRecords(),
        ProgressBar(),
        Checkpoints(training.checkpointing_steps),
        *([Validation(validation)] if validation.prompts else []),
        RunPage(),
        FreeMemory(),
    ]


def begin(run: Trainable, start: int) -> None:
    """What a built run does before its first step: clears what it replaces, records itself, prints its plan, and starts
    its trackers. Only the main process writes."""
    if run.accelerator.is_main_process:
        if run.config.overwrite_output_dir and start == 0 and (run.output_dir / "run.json").is_file():
            clear_output(run.output_dir)
        inputs = inputs_record(
            run.base.source, run.base.family.name, run.config.data.path, run.identity.get("data", {})
        )
        record(run.config, run.output_dir, run.accelerator, inputs)
        print(run.describe(start), flush=True)
    if run.config.training.report_to != "none":
        run.accelerator.init_trackers("logs")


def report_rows(table: Table, path: str) -> None:
    """Logs how many rows are usable, and names the first of the others."""
    log.info("%d usable pairs of %d rows in %s", len(table), table.total_rows, path)
    left_out = [problem for problem in table.problems if problem.dropped]
    for problem in left_out[:NAMED]:
        log.warning("row left out: %s", problem)
    if len(left_out) > NAMED:
        log.warning("… and %d more rows; `diffalign data check` names them all", len(left_out) - NAMED)


def claim(config: AnyConfig) -> None:
    """Checks that the run may write to its output folder; changes nothing.

    Raises ConfigError when it is a file, when it contains a model or weights that no run wrote, when it contains a
    run that is neither resumed nor to be overwritten, or when a resumed run's settings differ from the recorded ones
    in more than `_FREE`. Raises CheckpointError when there is nothing to resume.
    """
    output_dir, resumed = Path(config.output_dir), config.training.resume_from_checkpoint
    ours = (output_dir / "config.yaml").is_file() and (output_dir / "run.json").is_file()
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"output_dir: {output_dir} is a file; name a folder for the run")
    if (output_dir / "model_index.json").exists() or (has_final_weights(output_dir) and not ours):
        raise ConfigError(
            f"output_dir: {output_dir} contains a model, which a run would overwrite; name another folder"
        )
    if ours and resumed is None and not config.overwrite_output_dir:
        raise ConfigError(
            f"output_dir: {output_dir} already contains a run; set training.resume_from_checkpoint=latest to "
            "continue it, overwrite_output_dir=true to replace it, or name another folder"
        )
    if resumed is not None:
        if ours:
            _same_settings(output_dir / "config.yaml", config)
        if (folder := find_checkpoint(output_dir, resumed)) is not None:
            _same_settings(folder / "config.yaml", config)


def _same_settings(recorded: Path, config: AnyConfig) -> None:
    """Raises ConfigError naming every setting that must not change on resuming and did."""
    was, now = _with_defaults(read_yaml(recorded)), config.resolved()
    changed = _changes(was, now)
    if (now["data"].get("curriculum") or {"steps": 0})["steps"] is None:  # as long as the run: its order would change
        length = [tree["training"]["max_train_steps"] for tree in (was, now)]
        changed += [("training.max_train_steps", *length)] if length[0] != length[1] else []
    batch = [tree["training"]["train_batch_size"] for tree in (was, now)]
    lists = isinstance(config, Config) and config.objective.compares == "lists"
    grouped = lists or now["data"].get("aspect_buckets") is not None  # a micro-batch is a group of a bucket or length
    if grouped and batch[0] != batch[1]:
        changed.append(("training.train_batch_size", *batch))
    if changed:
        lines = "\n".join(f"  {name}: was {was!r}, is {now!r}" for name, was, now in changed)
        raise ConfigError(
            f"the run of {recorded.parent} was started with other settings, and resuming would mix them:\n{lines}\n"
            "restore them, or start a new run in another output_dir"
        )


def _with_defaults(recorded: dict[str, Any]) -> dict[str, Any]:
    """Recorded settings, with defaults for those that an older version did not have."""
    try:
        return parse_config(recorded, recorded=True).resolved()
    except DiffalignError:
        return recorded


def record(config: AnyConfig, output_dir: Path, accelerator: Accelerator, inputs: dict[str, Any]) -> None:
    """Writes config.yaml (resolved) and run.json (versions, commit, device, processes, what base and data were)."""
    output_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, output_dir / "config.yaml")
    facts = {
        **environment(),
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "command": sys.argv,
        INPUTS: inputs,
    }
    save_text(output_dir / "run.json", json.dumps(facts, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Package versions, Python, platform and the git commit of the working folder, as far as there is one."""
    machine = {"python": platform.python_version(), "platform": platform.platform()}
    return {"versions": dict(_versions()), **machine, **_commit()}


@cache  # the modules of this process stay what they are
def _versions() -> Mapping[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _commit() -> dict[str, Any]:
    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {"git_commit": commit, "git_dirty": None if commit is None else bool(git("status", "--porcelain"))}


# Settings that may change when a run is resumed: its length, its monitoring, its distribution over devices.
_FREE = {
    "output_dir",
    "overwrite_output_dir",
    "validation.prompts",
    "validation.every",
    "validation.num_inference_steps",
    "validation.guidance_scale",
    "validation.seed",
    "validation.user",
    "validation.pairs_every",
    "validation.pairs_batch_size",
    "validation.early_stopping_patience",
    "validation.least_diversity",
    "validation.least_faithfulness",
    "health",
    "data.dataloader_num_workers",
    "model.gradient_checkpointing",
    "model.attention",
    "model.compile",
    "model.channels_last",
    "model.fused_kernels",
    "training.max_train_steps",
    "training.max_unet_forwards",
    "training.train_batch_size",
    "training.gradient_accumulation_steps",
    "training.reference_batch_size",
    "training.checkpointing_steps",
    "training.checkpoints_total_limit",
    "training.async_checkpoints",
    "training.resume_from_checkpoint",
    "training.logging_steps",
    "training.report_to",
}


def _changes(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    changed = []
    for name in {**was, **now}:
        path = f"{prefix}{name}"
        if path in _FREE:
            continue
        a, b = was.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += _changes(a, b, f"{path}.")
        elif a != b:
            changed.append((path, a, b))
    return changed
