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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from diffalign.cli.common import count, path
from diffalign.cli.next_steps import print_next
from diffalign.errors import DiffalignError

LAUNCH = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
SEEDS = {"emoji": "0-5", "small": "0-11"}  # images of each held-out prompt and model


class DemoError(DiffalignError):
    """A command of the demo failed (its output has the reason), or there is no such world."""


@dataclass(frozen=True)
class World:
    """What the demo runs on."""

    config: str  # packaged
    base: Path
    pairs: Path
    prompts: list[str]  # held out
    control: tuple[str, ...]  # module and arguments that write the shuffled pairs, before the file
    scorers: tuple[str, ...]
    faithfulness: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Output folder, world and length."""
    parser.add_argument(
        "--out", type=path, default=Path("runs/demo"), help="output folder of the demo (default: %(default)s)"
    )
    parser.add_argument(
        "--world",
        choices=tuple(SEEDS),
        default="emoji",
        help="emoji: 64x64 images of real art; small: 16x16 images, in half the time (default: %(default)s)",
    )
    parser.add_argument("--steps", type=count, default=None, help="optimiser steps (default: the config's)")


def run(args: argparse.Namespace) -> None:
    """Runs the demo."""
    run_demo(args.out, world=args.world, steps=args.steps)


def run_demo(out: Path, world: str = "emoji", steps: int | None = None) -> None:
    """Tunes a world's base with DPO and with shuffled labels, and evaluates both on held-out prompts.

    Writes everything below `out`; runs of an earlier demo there are replaced. The control is tuned at the same time,
    each run on its half of the cores. Raises DemoError for a world that there is not and when a command fails.
    """
    from diffalign.config.schema import packaged_config

    begun, w = time.perf_counter(), _world(world)
    out.mkdir(parents=True, exist_ok=True)
    heldout, control, log = out / "heldout.txt", out / "shuffled.parquet", out / "shuffled.log"
    heldout.write_text("".join(f"{prompt}\n" for prompt in w.prompts))
    shared = [f"model.pretrained_model_name_or_path={w.base}", "overwrite_output_dir=true"]
    if steps is not None:
        shared.append(f"training.max_train_steps={steps}")

    def train(pairs: Path, name: str) -> list[str]:
        config = str(packaged_config(w.config))
        return ["diffalign", "train", config, f"data.path={pairs}", f"output_dir={out / name}", *shared]

    _finish(_start([*w.control, str(control), "--overwrite"]))
    with log.open("w") as file:
        background = _start(train(control, "shuffled"), launch=True, output=file)
        try:
            print(f"  (in the background, output in {log})")
            _finish(_start(train(w.pairs, "dpo"), launch=True))
            _finish(background)
        finally:
            if background.poll() is None:
                os.killpg(background.pid, signal.SIGTERM)  # accelerate launch and the training it started
    _finish(
        _start(
            [
                *("diffalign", "evaluate", str(w.base)),
                *("--tuned", f"dpo={out / 'dpo'}", "--tuned", f"shuffled={out / 'shuffled'}"),
                *("--prompts", str(heldout), "--seeds", SEEDS[world], "--steps", "20", "--guidance", "5"),
                *(word for name in w.scorers for word in ("--scorer", name)),
                *("--faithfulness", w.faithfulness, "--out", str(out / "evaluation")),
            ],
            share=1,
        )
    )
    print("\nshuffled: the same images with random labels, the control that should gain nothing.")
    print(f"Images before and after, side by side: {out / 'evaluation' / 'grid.png'}")
    print(f"Loss, rewards and margins during training:  tensorboard --logdir {out}")
    print(f"{time.perf_counter() - begun:.0f} seconds in total")
    print_next(["init", "my.yaml"])


def _world(name: str) -> World:
    if name not in SEEDS:
        raise DemoError(f"world is {name!r}; it must be one of {', '.join(map(repr, SEEDS))}")
    if name == "small":
        from diffalign.world import base_path, pairs_path
        from diffalign.world.captions import prompts

        return World(
            config="world/dpo.yaml",
            base=base_path(),
            pairs=pairs_path(),
            prompts=prompts("heldout"),
            control=("diffalign", "data", "world", "--pairs", "1024", "--shuffle-labels"),
            scorers=("world",),
            faithfulness="world-accuracy",
        )
    from diffalign.world import emoji
    from diffalign.world.emoji import captions

    return World(
        config="emoji/dpo.yaml",
        base=emoji.base_path(),
        pairs=emoji.pairs_path(),
        prompts=captions.prompts("heldout"),
        control=("diffalign.world.emoji.controls", "--out"),
        scorers=("emoji-glossy", "emoji"),
        faithfulness="emoji-accuracy",
    )


def _start(
    arguments: Sequence[str], *, launch: bool = False, output: IO[str] | None = None, share: int = 2
) -> subprocess.Popen[bytes]:
    """Starts a module on one of `share` equal parts of the cores and prints it as a user would type it."""
    words = (
        ["accelerate", "launch", *LAUNCH, "-m"] if launch else [] if arguments[0] == "diffalign" else ["python", "-m"]
    )
    print(f"\n$ {shlex.join([*words, *arguments])}", flush=True)
    prefix = ["-m", "accelerate.commands.launch", *LAUNCH] if launch else []
    # Small networks gain nothing from many threads, and two runs with all of them each would wait for one another.
    threads = str(max(1, (os.cpu_count() or 2) // share))
    return subprocess.Popen(
        [sys.executable, *prefix, "-m", *arguments],
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
