"""`diffalign demo`: preference tuning from pairs on disk to a measured gain, in a few minutes on a CPU.

The demo is a list of ordinary commands, printed as they run. Beside the model under test a second one is tuned on the
same images with shuffled labels: what it gains is what the procedure gains from nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

from diffalign.cli.common import count, path
from diffalign.cli.next_steps import print_next
from diffalign.errors import DiffalignError

SEEDS = "0-11"  # images of each held-out prompt and model
PAIRS = 1024  # of the control; the same images as the packaged pairs
LAUNCH = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


class DemoError(DiffalignError):
    """A command of the demo failed; its output has the reason."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Output folder and length."""
    parser.add_argument(
        "--out", type=path, default=Path("runs/demo"), help="output folder of the demo (default: %(default)s)"
    )
    parser.add_argument("--steps", type=count, default=None, help="optimiser steps (default: the config's)")


def run(args: argparse.Namespace) -> None:
    """Runs the demo."""
    run_demo(args.out, steps=args.steps)


def run_demo(out: Path, steps: int | None = None) -> None:
    """Tunes the world's base with DPO and with shuffled labels, and evaluates both on held-out prompts.

    Writes everything below `out`; runs of an earlier demo there are replaced. The control is tuned at the same time,
    each run on its half of the cores. Raises DemoError when a command fails.
    """
    from diffalign.config.schema import packaged_config
    from diffalign.world import base_path, pairs_path
    from diffalign.world.captions import prompts

    begun = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    base, config = str(base_path()), str(packaged_config("world/dpo.yaml"))
    heldout, control, log = out / "heldout.txt", out / "shuffled.parquet", out / "shuffled.log"
    heldout.write_text("".join(f"{prompt}\n" for prompt in prompts("heldout")))
    shared = [f"model.pretrained_model_name_or_path={base}", "overwrite_output_dir=true"]
    if steps is not None:
        shared.append(f"training.max_train_steps={steps}")

    def train(pairs: Path, name: str) -> list[str]:
        return ["train", config, f"data.path={pairs}", f"output_dir={out / name}", *shared]

    _finish(_start(["data", "world", str(control), "--pairs", str(PAIRS), "--shuffle-labels", "--overwrite"]))
    with log.open("w") as file:
        background = _start(train(control, "shuffled"), launch=True, output=file)
        try:
            print(f"  (in the background, output in {log})")
            _finish(_start(train(pairs_path(), "dpo"), launch=True))
            _finish(background)
        finally:
            if background.poll() is None:
                os.killpg(background.pid, signal.SIGTERM)  # accelerate launch and the training it started
    _finish(
        _start(
            [
                *("evaluate", base, "--tuned", f"dpo={out / 'dpo'}", "--tuned", f"shuffled={out / 'shuffled'}"),
                *("--prompts", str(heldout), "--seeds", SEEDS, "--steps", "20", "--guidance", "5"),
                *("--scorer", "world", "--faithfulness", "world-accuracy", "--out", str(out / "evaluation")),
            ]
        )
    )
    print("\nshuffled: the same images with random labels, the control that should gain nothing.")
    print(f"Images before and after, side by side: {out / 'evaluation' / 'grid.png'}")
    print(f"Loss, rewards and margins during training:  tensorboard --logdir {out}")
    print(f"{time.perf_counter() - begun:.0f} seconds in total")
    print_next(["init", "my.yaml"])


def _start(arguments: Sequence[str], *, launch: bool = False, output: IO[str] | None = None) -> subprocess.Popen[bytes]:
    """Starts a diffalign command and prints it as a user would type it."""
    words = ["accelerate", "launch", *LAUNCH, "-m", "diffalign"] if launch else ["diffalign"]
    print(f"\n$ {shlex.join([*words, *arguments])}", flush=True)
    prefix = ["-m", "accelerate.commands.launch", *LAUNCH] if launch else []
    # Small networks gain nothing from many threads, and two runs with all of them each would wait for one another.
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    return subprocess.Popen(
        [sys.executable, *prefix, "-m", "diffalign", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)},
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=output is not None,
    )


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != 0:
        raise DemoError(
            f"{shlex.join(map(str, cast('list[str]', process.args)))} ended with status {process.returncode}"
        )
