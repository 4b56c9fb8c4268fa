"""The command line. Each command has a small module, which is imported when the command runs.

diffalign train CONFIG [key.sub=value ...]       also: accelerate launch -m diffalign train CONFIG ...
                                                 also: torchrun --nproc-per-node 2 -m diffalign train CONFIG ...
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from diffalign import __version__
from diffalign.cli.arena import arena, arena_arguments
from diffalign.cli.common import Parser, count, overwrite_argument, path, whole, writable
from diffalign.cli.data import data, data_arguments
from diffalign.cli.export import export, export_arguments
from diffalign.cli.list import list_all, list_arguments
from diffalign.cli.merge import merge, merge_arguments
from diffalign.cli.pictures import compare, compare_arguments, label, label_arguments, score, score_arguments
from diffalign.cli.sampling import evaluate, evaluate_arguments, generate, generate_arguments
from diffalign.cli.terminal import guarded
from diffalign.errors import BUG, DiffalignError, Interrupted, explain, printable
from diffalign.training.processes import one_process

if TYPE_CHECKING:
    from diffalign.config.schema import Config
    from diffalign.data.table.pairs import PairTable

CONFIG_HELP = "YAML file; `diffalign list` shows the packaged ones"
SEVERAL_PROCESSES = ("train", "check", "encode")  # commands that share their work among launched processes
OVERRIDES_HELP = "overrides, e.g. training.learning_rate=1e-5 objective.beta=2000"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Exit status 2: something the user can mend, in one message. 1: a bug of ours, with its
    traceback. 128 + n: ended by signal n (130: SIGINT, 143: SIGTERM)."""
    with guarded():
        _run(argv)


def _run(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)
    _quiet_libraries()
    main_thread = threading.current_thread() is threading.main_thread()  # signals are its affair alone
    before = signal.signal(signal.SIGTERM, _terminated) if main_thread else None
    try:
        if args.command not in SEVERAL_PROCESSES:
            one_process(args.command)
        args.run(args)
    except KeyboardInterrupt as stop:
        reason, signum = printable(str(stop)) or "interrupted", getattr(stop, "signum", signal.SIGINT)
        print(f"diffalign {args.command}: {reason}", file=sys.stderr)
        sys.exit(128 + signum)
    except BrokenPipeError:  # whatever read our output has gone, as `head` does
        with suppress(
            OSError, ValueError
        ):  # nothing more can be written, and Python's own flush at exit would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        said = explain(error)
        if said is None or os.environ.get("DIFFALIGN_TRACEBACK"):
            traceback.print_exc()
        if said is None:
            print(f"\ndiffalign {args.command}: {BUG}", file=sys.stderr)
            sys.exit(1)
        print(f"diffalign {args.command}: {said}", file=sys.stderr)
        sys.exit(2)
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def _terminated(signum: int, _: object) -> None:
    """SIGTERM ends a command as SIGINT does: files half written are removed and locks given back."""
    raise Interrupted(signum, "terminated")


def _parser() -> Parser:
    parser = Parser(
        prog="diffalign",
        description="Preference tuning of text-to-image diffusion models.",
        epilog="DIFFALIGN_TRACEBACK=1 shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    for name, run, help in (
        ("train", _train, "tune a model with a config"),
        ("check", _check, "dry run: build a run, take one small step, print the plan"),
        ("encode", _encode, "fill the latent cache of a config (data.cache_dir)"),
        ("diagnose", _diagnose, "compare an objective's gradient with Diffusion-DPO's, before any step"),
        ("calibrate", _calibrate, ("measure which beta and which learning rate fit a config's model and pairs")),
    ):
        sub = command(name, run, help)
        sub.add_argument("config", type=path, help=CONFIG_HELP)
        sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help=OVERRIDES_HELP)
        if name == "diagnose":
            sub.add_argument("--batches", type=count, default=8, help="micro-batches of the run's pairs (default 8)")
        if name == "calibrate":
            sub.add_argument(
                "--steps", type=whole(2, 4096), default=16, help="optimiser steps, a power of two (default 16)"
            )
            sub.add_argument("--pairs", type=count, default=128, help=("pairs used for measuring (default 128)"))
        if name in ("diagnose", "calibrate"):
            sub.add_argument("--json", type=path, help="also write the results to this file")
            overwrite_argument(sub)

    generate_arguments(command("generate", generate, "generate images with a base or a tuned model"))
    evaluate_arguments(command("evaluate", evaluate, "compare tuned models with their base on the same seeds"))
    compare_arguments(command("compare", compare, "compare existing image folders"))
    score_arguments(command("score", score, "score existing images"))
    label_arguments(command("label", label, "make preference pairs from images: each prompt's best over its worst"))
    arena_arguments(command("arena", arena, "run every objective on the embedded world and write the leaderboard"))
    merge_arguments(command("merge", merge, "merge tuned weights: average, extrapolate, mix"))
    export_arguments(command("export", export, "export tuned weights as files for ComfyUI, A1111 and kohya's scripts"))
    data_arguments(command("data", data, "check or score pairs, or write the embedded world's pairs"))

    list_arguments(command("list", list_all, "list the packaged objectives, sources, configs and scorers"))

    sub = command("demo", _demo, "tune the embedded world's model and measure the gain")
    sub.add_argument(
        "--out", type=path, default=Path("runs/demo"), help=("output folder of the demo (default: %(default)s)")
    )
    sub.add_argument("--steps", type=count, default=None, help="optimiser steps (default: the config's)")
    return parser


def _quiet_libraries() -> None:
    """Silences what libraries print on import and for every load; our own messages and warnings stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in ("httpx", "accelerate", "datasets", "urllib3", "filelock", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not sys.warnoptions:  # python -W and PYTHONWARNINGS show them
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", kind)
        warnings.filterwarnings("ignore", message="(?is).*(deprecated|use the new API settings to control TF32)")
    # Pillow's, of pictures that are refused with a reason of their own
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")


def _train(args: argparse.Namespace) -> None:
    from diffalign.config.schema import PreferenceModelConfig, load_config
    from diffalign.training.preference_model.train import run_preference_training
    from diffalign.training.run import run_training

    config = load_config(args.config, args.overrides)
    if isinstance(config, PreferenceModelConfig):
        run_preference_training(config)
    else:
        run_training(config)


def _check(args: argparse.Namespace) -> None:
    from diffalign.config.schema import PreferenceModelConfig, load_config
    from diffalign.training.build import build
    from diffalign.training.inspect.dry_run import describe, dry_run
    from diffalign.training.optim.optimizers import effective_lr
    from diffalign.training.preference_model.train import check_preference_run
    from diffalign.training.processes import make_accelerator, on_main
    from diffalign.training.remedies import with_remedies
    from diffalign.training.run import claim
    from diffalign.training.settle import settled, with_precision

    config = load_config(args.config, args.overrides, ["training.report_to=none"])
    accelerator = make_accelerator(config)
    config = with_precision(config, accelerator.device)
    claim(config, Path(config.output_dir))
    if isinstance(config, PreferenceModelConfig):
        found = check_preference_run(config, accelerator)
        if accelerator.is_main_process:
            print(found)
        accelerator.end_training()
        return
    changes: dict[str, Any] = {}
    if config.source is not None:
        changes["source"] = config.source.small()
        one = {"train_batch_size": 1, "gradient_accumulation_steps": 1}  # a step of one pair, so that one is enough
        changes["training"] = config.training.model_copy(update=one)
    with ExitStack() as stack, with_remedies(config):
        folder = on_main(accelerator, lambda: stack.enter_context(TemporaryDirectory()))
        run = build(_look(config.model_copy(update=changes), folder), accelerator)
        planned = replace(
            run,
            config=settled(config, accelerator.device, run.base.family.name),
            lr=effective_lr(config.training, accelerator.num_processes),
        )
        if accelerator.is_main_process:
            print(describe(planned))
        tried = dry_run(planned)
        if accelerator.is_main_process:
            print(tried)
        accelerator.wait_for_everyone()  # the folder goes with the main process
    accelerator.end_training()


def _look(config: Config, folder: str) -> Config:
    """The run as a look at its machinery: no cache of hours is filled, and pairs that it makes go to `folder`."""
    data = {"cache_dir": None, "cache_variants": 1, "cache_trajectories": False, "cache_reference_errors": False}
    return config.model_copy(update={"data": config.data.model_copy(update=data), "output_dir": folder})


def _diagnose(args: argparse.Namespace) -> None:
    from diffalign.config.schema import PreferenceModelConfig, load_config
    from diffalign.training.build import build
    from diffalign.training.inspect.gradient_check import diagnose, plain_values, table
    from diffalign.training.processes import make_accelerator
    from diffalign.training.remedies import with_remedies

    writable([("--json", args.json)], args.overwrite)
    config = load_config(args.config, args.overrides, ["training.report_to=none"])
    if isinstance(config, PreferenceModelConfig):
        raise DiffalignError(
            "the run of a preference model has no objective to compare with "
            "Diffusion-DPO; give a config with an objective"
        )
    with TemporaryDirectory() as folder, with_remedies(config):
        found = diagnose(build(_look(config, folder), make_accelerator(config)), args.batches)
    print(table(found))
    if args.json is not None:
        args.json.write_text(json.dumps(plain_values(found), indent=2) + "\n", encoding="utf-8")


def _calibrate(args: argparse.Namespace) -> None:
    from diffalign.config.schema import PreferenceModelConfig, load_config
    from diffalign.training.build import build
    from diffalign.training.inspect.calibrate import calibratable, calibrate
    from diffalign.training.inspect.calibration_report import plain_values, report
    from diffalign.training.processes import make_accelerator
    from diffalign.training.remedies import with_remedies

    writable([("--json", args.json)], args.overwrite)
    config = load_config(args.config, args.overrides, ["training.report_to=none"])
    if isinstance(config, PreferenceModelConfig):
        raise DiffalignError(
            "the run of a preference model has no objective, and so no beta to "
            "calibrate; give a config with an objective"
        )
    calibratable(config)  # before a model is loaded
    with TemporaryDirectory() as folder, with_remedies(config):
        found = calibrate(build(_look(config, folder), make_accelerator(config)), args.steps, args.pairs)
    print(report(found))
    if args.json is not None:
        args.json.write_text(json.dumps(plain_values(found), indent=2) + "\n", encoding="utf-8")


def _encode(args: argparse.Namespace) -> None:
    from diffalign.config.schema import PreferenceModelConfig, load_config
    from diffalign.models.loading.encoder import Encoder
    from diffalign.training.build import load_run_base
    from diffalign.training.build_source import encode_run, processes_of
    from diffalign.training.open_data import open_table
    from diffalign.training.processes import make_state
    from diffalign.training.remedies import with_remedies

    config = load_config(args.config, args.overrides)
    if isinstance(config, PreferenceModelConfig):
        raise DiffalignError("the run of a preference model has no encode cache: it encodes its pairs at every visit")
    if config.data.cache_dir is None:
        raise DiffalignError("data.cache_dir is not set: name the folder of the cache, e.g. data.cache_dir=cache/pairs")
    state = make_state()
    with with_remedies(config):
        table = cast("PairTable", open_table(config, state))  # a run with a source has no cache
        base = load_run_base(config.model)
        encoder = Encoder(base, state.device)
        resolution = config.data.resolution or base.family.default_resolution
        encode_run(config.data, config.seed, table, encoder, resolution, processes_of(state))
        state.wait_for_everyone()
    if state.is_main_process:
        print(f"{config.data.cache_dir} holds {len(table)} pairs at {resolution} pixels")


def _demo(args: argparse.Namespace) -> None:
    from diffalign.cli.demo import run_demo

    run_demo(args.out, steps=args.steps)
