"""The command line. Each command is a thin door to a room; rooms are imported when their command runs.

diffalign train CONFIG [key.sub=value ...]       also: accelerate launch -m diffalign train CONFIG ...
                                                 also: torchrun --nproc-per-node 2 -m diffalign train CONFIG ...
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from diffalign import __version__
from diffalign.cli_arena import arena, arena_arguments
from diffalign.cli_data import data, data_arguments
from diffalign.cli_export import export, export_arguments
from diffalign.cli_list import list_all, list_arguments
from diffalign.cli_merge import merge, merge_arguments
from diffalign.cli_pictures import compare, compare_arguments, label, label_arguments, score, score_arguments
from diffalign.cli_words import device_of, named
from diffalign.errors import BUG, DiffalignError, Interrupted, explain, printable
from diffalign.training.processes import one_process

if TYPE_CHECKING:
    from diffalign.config import Config

CONFIG_HELP = "YAML file; `diffalign list` names those that come with the package"
SEVERAL_PROCESSES = ("train", "check", "encode")  # commands that share their work among launched processes
OVERRIDES_HELP = "overrides, e.g. training.learning_rate=1e-5 objective.beta=2000"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Exit status 2: something the user can mend, in one message. 1: a bug of ours, with its
    traceback. 128 + n: ended by signal n (130: SIGINT, 143: SIGTERM)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 cannot end a command
    parser = _parser()
    args = parser.parse_args(argv)
    _quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main_thread = threading.current_thread() is threading.main_thread()  # signals are its affair alone
    before = signal.signal(signal.SIGTERM, _terminated) if main_thread else None
    try:
        if args.command not in SEVERAL_PROCESSES:
            one_process(args.command)
        args.run(args)
    except KeyboardInterrupt as stop:
        said, signum = printable(str(stop)) or "interrupted", getattr(stop, "signum", signal.SIGINT)
        print(f"diffalign {args.command}: {said}", file=sys.stderr)
        sys.exit(128 + signum)
    except Exception as error:
        said = explain(error)
        if said is None or os.environ.get("DIFFALIGN_TRACEBACK"):
            traceback.print_exc()
        if said is None:
            print(f"\ndiffalign {args.command}: {BUG}", file=sys.stderr)
            sys.exit(1)
        print(f"diffalign {args.command}: {printable(said)}", file=sys.stderr)
        sys.exit(2)
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def _terminated(signum: int, _: object) -> None:
    """SIGTERM ends a command as SIGINT does: files half written are removed and locks given back."""
    raise Interrupted(signum, "terminated")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffalign",
        description="Preference tuning of text-to-image diffusion models.",
        epilog="DIFFALIGN_TRACEBACK=1 shows where an error comes from.",
    )
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    for name, run, help in (
        ("train", _train, "tune a model as a config says"),
        ("check", _check, "build a run, take one tiny step, print the plan"),
        ("encode", _encode, "fill the encode cache of a config (data.cache_dir)"),
        ("diagnose", _diagnose, "an objective's gradient beside Diffusion-DPO's, before any step is taken"),
        ("calibrate", _calibrate, "measure which beta and which learning rate fit a config's model and pairs"),
    ):
        sub = command(name, run, help)
        sub.add_argument("config", help=CONFIG_HELP)
        sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help=OVERRIDES_HELP)
        if name == "diagnose":
            sub.add_argument("--batches", type=int, default=8, help="micro-batches of the run's pairs (default 8)")
            sub.add_argument("--json", type=Path, help="write the figures to this file as well")
        if name == "calibrate":
            sub.add_argument("--steps", type=int, default=16, help="optimiser steps, a power of two (default 16)")
            sub.add_argument("--pairs", type=int, default=128, help="pairs to measure at (default 128)")
            sub.add_argument("--json", type=Path, help="write the figures to this file as well")

    _generate_arguments(command("generate", _generate, "make pictures with a base or a tuned model"))
    _evaluate_arguments(command("evaluate", _evaluate, "compare tuned models with their base on the same seeds"))
    compare_arguments(command("compare", compare, "the same comparison for pictures that are there"))
    score_arguments(command("score", score, "score pictures that are there"))
    label_arguments(command("label", label, "make preference pairs of pictures: each prompt's best over its worst"))
    arena_arguments(command("arena", arena, "every objective on the embedded world: the leaderboard"))
    merge_arguments(command("merge", merge, "sum tuned weights: average, extrapolate, mix"))
    export_arguments(command("export", export, "tuned weights as files for ComfyUI, A1111 and kohya's scripts"))
    data_arguments(command("data", data, "look at pairs, or write the embedded world's"))

    list_arguments(command("list", list_all, "objectives, sources, configs and scorers that come with the package"))

    sub = command("demo", _demo, "tune the embedded world's model and measure what it gained")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo (default: %(default)s)")
    sub.add_argument("--steps", type=int, default=None, help="optimiser steps (default: the config's)")
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
    from diffalign.config import PreferenceModelConfig, load_config
    from diffalign.training.preference_model import run_preference_training
    from diffalign.training.run import run_training

    config = load_config(args.config, args.overrides)
    if isinstance(config, PreferenceModelConfig):
        run_preference_training(config)
    else:
        run_training(config)


def _check(args: argparse.Namespace) -> None:
    from diffalign.config import PreferenceModelConfig, load_config
    from diffalign.training.optim import effective_lr
    from diffalign.training.plan import describe, trial
    from diffalign.training.preference_model import check_preference_run
    from diffalign.training.processes import on_main
    from diffalign.training.remedies import with_remedies
    from diffalign.training.run import claim
    from diffalign.training.setup import build, make_accelerator

    config = load_config(args.config, args.overrides, ["training.report_to=none"])
    claim(config, Path(config.output_dir))
    if isinstance(config, PreferenceModelConfig):
        print(check_preference_run(config))
        return
    changes: dict[str, Any] = {}
    if config.source is not None:
        changes["source"] = config.source.small()
        one = {"train_batch_size": 1, "gradient_accumulation_steps": 1}  # a step of one pair, so that one is enough
        changes["training"] = config.training.model_copy(update=one)
    accelerator = make_accelerator(config)
    with ExitStack() as stack, with_remedies(config):
        folder = on_main(accelerator, lambda: stack.enter_context(TemporaryDirectory()))
        run = build(_look(config.model_copy(update=changes), folder), accelerator)
        planned = replace(run, config=config, lr=effective_lr(config.training, accelerator.num_processes))
        if accelerator.is_main_process:
            print(describe(planned))
        tried = trial(planned)
        if accelerator.is_main_process:
            print(tried)
        accelerator.wait_for_everyone()  # the folder goes with the main process
    accelerator.end_training()


def _look(config: Config, folder: str) -> Config:
    """The run as a look at its machinery: no cache of hours is filled, and pairs that it makes go to `folder`."""
    data = {"cache_dir": None, "cache_variants": 1, "cache_trajectories": False, "cache_reference_errors": False}
    return config.model_copy(update={"data": config.data.model_copy(update=data), "output_dir": folder})


def _diagnose(args: argparse.Namespace) -> None:
    from diffalign.config import PreferenceModelConfig, load_config
    from diffalign.training.diagnose import diagnose, plain_values, table
    from diffalign.training.remedies import with_remedies
    from diffalign.training.setup import build, make_accelerator

    if args.batches < 1:
        raise DiffalignError(f"--batches {args.batches}: give at least one")
    config = load_config(args.config, args.overrides, ["training.report_to=none"])
    if isinstance(config, PreferenceModelConfig):
        raise DiffalignError("a preference model's run has no objective, and so nothing to compare with Diffusion-DPO")
    with TemporaryDirectory() as folder, with_remedies(config):
        found = diagnose(build(_look(config, folder), make_accelerator(config)), args.batches)
    print(table(found))
    if args.json is not None:
        args.json.write_text(json.dumps(plain_values(found), indent=2) + "\n")


def _calibrate(args: argparse.Namespace) -> None:
    from diffalign.config import PreferenceModelConfig, load_config
    from diffalign.training.calibrate import calibratable, calibrate
    from diffalign.training.calibration import plain_values, report
    from diffalign.training.remedies import with_remedies
    from diffalign.training.setup import build, make_accelerator

    config = load_config(args.config, args.overrides, ["training.report_to=none"])
    if isinstance(config, PreferenceModelConfig):
        raise DiffalignError("a preference model's run has no objective, and so no beta to calibrate")
    calibratable(config)  # before a model is loaded
    with TemporaryDirectory() as folder, with_remedies(config):
        found = calibrate(build(_look(config, folder), make_accelerator(config)), args.steps, args.pairs)
    print(report(found))
    if args.json is not None:
        args.json.write_text(json.dumps(plain_values(found), indent=2) + "\n")


def _encode(args: argparse.Namespace) -> None:
    from diffalign.config import PreferenceModelConfig, load_config
    from diffalign.models.encoder import Encoder
    from diffalign.training.feed import encode_run
    from diffalign.training.processes import make_state
    from diffalign.training.remedies import with_remedies
    from diffalign.training.setup import load_run_base, open_table

    config = load_config(args.config, args.overrides)
    if isinstance(config, PreferenceModelConfig):
        raise DiffalignError("a preference model's run has no encode cache: it encodes its pairs at every visit")
    if config.data.cache_dir is None:
        raise DiffalignError("data.cache_dir is not set: name the folder of the cache, e.g. data.cache_dir=cache/pairs")
    state = make_state()
    with with_remedies(config):
        table = open_table(config, state)
        base = load_run_base(config)
        encoder = Encoder(base, state.device)
        resolution = config.data.resolution or base.family.default_resolution
        encode_run(config, table, encoder, resolution, state.process_index, state.num_processes)
        state.wait_for_everyone()
    if state.is_main_process:
        print(f"{config.data.cache_dir} holds {len(table)} pairs at {resolution} pixels")


def _demo(args: argparse.Namespace) -> None:
    from diffalign.demo import run_demo

    run_demo(args.out, steps=args.steps)


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts", required=True, help=".txt (one a line), .jsonl, .csv, .parquet, or one prompt itself"
    )
    parser.add_argument("--limit", type=int, help="use only the first prompts")
    parser.add_argument("--seeds", default="0", help="e.g. 7, 0-11 or 0,3,5 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance scale")
    parser.add_argument("--scheduler", default="ddim", help="ddim, euler or dpmsolver")
    parser.add_argument("--resolution", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--batch", type=int, help="pictures at a time (default: by resolution)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--vae", help="another VAE, e.g. an fp16-safe one")
    parser.add_argument("--prediction-type", help="override of the scheduler config's")
    parser.add_argument("--users", help="file of users' embeddings (.json, .parquet, .safetensors), for --user")
    parser.add_argument(
        "--user", action="append", metavar="ID[=WEIGHT]", help="for whom, with user attention; several are averaged"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "steps",
        "guidance",
        "scheduler",
        "resolution",
        "negative_prompt",
        "batch",
        "dtype",
        "vae",
        "prediction_type",
    )
    return {
        "device": device_of(args.device),
        "out_dir": args.out,
        "user": _user(args),
        **{name: getattr(args, name) for name in names},
    }


def _user(args: argparse.Namespace) -> list[float] | None:
    """The embedding of whom pictures are for: a user of the file, or some of them averaged."""
    from diffalign.data.users import open_users, parse_mixture

    if bool(args.users) != bool(args.user):
        raise DiffalignError("--users FILE and --user ID belong together: a file of embeddings, and who of it")
    return open_users(args.users).mixed(parse_mixture(args.user)).tolist() if args.users else None


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="diffusers folder, Hub id or single-file checkpoint")
    parser.add_argument("--tuned", help="LoRA file, full unet folder, or output_dir of a run")
    parser.add_argument(
        "--negative-tuned",
        metavar="PATH",
        help="the same for guidance's unconditional branch, e.g. a run with data.invert_preference (Diffusion-NPO)",
    )
    _sampling_arguments(parser)


def _generate(args: argparse.Namespace) -> None:
    from diffalign.data.prompts import read_prompts
    from diffalign.evaluation.generate import generate

    prompts = read_prompts(args.prompts, limit=args.limit)
    weights = {"tuned": args.tuned, "negative_tuned": args.negative_tuned}
    pictures = generate(args.model, prompts, parse_seeds(args.seeds), **weights, **_sampling(args))
    print(f"{len(pictures)} pictures in {args.out}")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="what the tuned models were tuned from: folder, Hub id or single file")
    parser.add_argument(
        "--tuned",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a tuned model; give the same NAME again for runs that differ in their seed",
    )
    parser.add_argument(
        "--negative-tuned",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="weights of the unconditional branch for NAME; without --tuned NAME=… the other branch is the base's",
    )
    parser.add_argument("--scorer", action="append", required=True, help="`diffalign list scorers`; may be repeated")
    parser.add_argument("--faithfulness", help="scorer that guards faithfulness to the prompt")
    parser.add_argument("--tie", type=float, help="|dR| below this is a tie (default: the scorer's own)")
    _sampling_arguments(parser)


def _evaluate(args: argparse.Namespace) -> None:
    from diffalign.data.prompts import read_prompts
    from diffalign.evaluation.evaluate import evaluate

    if not args.tuned and not args.negative_tuned:
        raise DiffalignError("nothing to compare with the base: give --tuned NAME=PATH, e.g. --tuned dpo=runs/dpo")
    result = evaluate(
        args.base,
        named(args.tuned, "--tuned"),
        read_prompts(args.prompts, limit=args.limit),
        parse_seeds(args.seeds),
        scorers=args.scorer,
        faithfulness=args.faithfulness,
        tie=args.tie,
        negative_tuned=named(args.negative_tuned, "--negative-tuned"),
        **_sampling(args),
    )
    print(result.table())
    print(f"{args.out}: result.json, table.txt, scores.jsonl, grid.png, images/")


def parse_seeds(text: str) -> list[int]:
    """Seeds from "7", "0-11" (both ends) or "0,3,5"; raises ValueError for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise DiffalignError(f"--seeds {text}: write 7, 0-11 or 0,3,5")
        seeds += range(int(first), int(last if dash else first) + 1)
    if not seeds:
        raise DiffalignError(f"--seeds {text}: the range is empty")
    return seeds
