"""Launches every packaged config of a family as a user would, on random weights: does it run, and how long?

    python -m benchmarks.launches --device cpu --model tiny                   # the SDXL configs on the tiny model
    python -m benchmarks.launches --device cuda --model sdxl                  # 2.57 billion random weights at 1024 px
    python -m benchmarks.launches --device cuda --model sd15 --only dpo_full kto_full

Each run is its own process: `accelerate launch -m diffalign train CONFIG …` on noise images. The weights, the data,
the scorer (the brightness of an image), the numbers of micro-batches and steps, and the number of generated images are
replaced; all other settings are the config's. A run counts if it exits with status 0, its losses are finite and its
final weights exist. At equal weights the first loss of the DPO family is log 2 to the last bit, and the table shows
whether it is. Left out: `step_aware`, because a preference model starts from CLIP, for which there are no random
weights here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from benchmarks.memory import table
from benchmarks.models import MODELS, model_folder, pairs_file
from benchmarks.ours import on_random_weights
from diffalign.config.schema import Config, load_config
from diffalign.training.checkpoints.final_weights import is_finished
from diffalign.training.run import environment

ROOT = Path(__file__).parent.parent
FAMILY = {"tiny": "sdxl", "small": "sdxl", "sdxl": "sdxl", "sd15": "sd15"}
LEFT_OUT = ("step_aware",)
JUDGE = "tests.sources.judges:Brightness"
STARTS_AT_LOG_2 = ("dpo", "inpo", "smpo", "inversion_dpo", "spo", "seppo")
# A source's own numbers -> what is enough to see it work: one round or iteration, then steps on it.
SMALL = {"images_per_iteration": 4, "prompts_per_round": 2, "generation_batch_size": 2, "updates_per_iteration": 2}


def overrides(config: Config, base: Path, data: dict[str, Path], resolution: int, out: Path, a: Any) -> list[str]:
    """What a launch changes of a config."""
    source = config.source
    given = data["prompts" if source is not None and source.data == "prompts" else "pairs"]
    changes = on_random_weights(base, given, resolution, out)
    changes += [f"training.max_train_steps={a.steps}", "training.logging_steps=1"]
    if config.data.cache_dir is not None:
        changes.append(f"data.cache_dir={out / 'cache'}")
    if a.device == "cpu":
        changes += ["training.mixed_precision=no", "data.dataloader_num_workers=0"]
        if config.training.optimizer.startswith("adamw"):
            changes.append("training.optimizer=adamw")  # some need CUDA, some half precision
    if source is not None:
        changes += [f"source.{name}={value}" for name, value in SMALL.items() if hasattr(source, name)]
        if hasattr(source, "scorer"):
            changes += [f"source.scorer={JUDGE}", "source.threshold=1e-6"]  # of another unit
    return changes


def launch(config: Path, changes: list[str], out: Path, a: Any) -> dict[str, Any]:
    """One run to its end, and what is left of it."""
    launcher = ["--cpu"] if a.device == "cpu" else []
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--num_processes", str(a.processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "diffalign", "train", str(config), *changes]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    begun = time.perf_counter()
    with DeviceMemory(a.device) as memory:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
    file = out / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    losses = [line["loss"] for line in lines]
    ok = done.returncode == 0 and is_finished(out) and bool(losses) and all(map(math.isfinite, losses))
    return {
        "ok": ok,
        "wall_seconds": time.perf_counter() - begun,
        "steps": lines[-1]["step"] if lines else 0,
        "unet_forwards": lines[-1]["unet_forwards"] if lines else 0,
        "losses": losses,
        "peak_bytes": memory.bytes,
        "said": None if ok else done.stderr[-3000:],
    }


class DeviceMemory:
    """The most bytes in use on the device within the block, asked twice a second; 0 on a CPU."""

    def __init__(self, device: str) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if device == "cuda" else None

    def __enter__(self) -> DeviceMemory:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._stop.wait(0.5):
            found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
            self.bytes = max([self.bytes, *(int(x) * 2**20 for x in found if x.isdigit())])


def row(name: str, config: Config, found: dict[str, Any]) -> list[str]:
    """A line of the table."""
    losses, start = found["losses"], "-"
    if losses and config.objective.name in STARTS_AT_LOG_2:
        start = "yes" if losses[0] == float(np.log(np.float32(2))) else f"off by {losses[0] - math.log(2):.1e}"
    memory = f"{found['peak_bytes'] / 2**30:.1f}" if found["peak_bytes"] else "-"
    shown = " ".join(f"{loss:.4f}" for loss in losses)
    run, wall = "ended" if found["ok"] else "failed", f"{found['wall_seconds']:.0f}"
    return [name, config.objective.name, run, str(found["steps"]), shown, start, wall, memory]


HEAD = ["config", "objective", "run", "steps", "losses", "starts at log 2", "wall, s", "device GiB"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module. Ends with status 1 when a run failed."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--model", choices=tuple(FAMILY), default="tiny")
    p.add_argument("--resolution", type=int, help="pixels; default: the model's own")
    p.add_argument("--only", nargs="+", metavar="CONFIG", help="names without .yaml; default: all of the family")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--work", type=Path, help="folder for models, pairs and runs, kept; default: a temporary one")
    p.add_argument("--out", type=Path, default=Path("runs/launches"), help="OUT.json and OUT.md")
    a = p.parse_args(arguments)
    resolution = a.resolution or MODELS[a.model]
    configs = {file.stem: file for file in sorted((ROOT / "training_configs" / FAMILY[a.model]).glob("*.yaml"))}
    names = a.only or [name for name in configs if name not in LEFT_OUT]
    if unknown := [name for name in names if name not in configs or name in LEFT_OUT]:
        p.error(f"--only {' '.join(unknown)}: there are {', '.join(name for name in configs if name not in LEFT_OUT)}")
    found: dict[str, dict[str, Any]] = {}
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        base = model_folder(a.model, work / a.model)
        data = {"pairs": pairs_file(work / "pairs" / "train.parquet", 16, resolution), "prompts": work / "prompts.txt"}
        data["prompts"].write_text("".join(f"a photo of a small red circle, number {i}\n" for i in range(16)))
        for name in names:
            config, out = load_config(configs[name]), work / "runs" / name
            assert isinstance(config, Config)
            found[name] = launch(configs[name], overrides(config, base, data, resolution, out, a), out, a)
            rows.append(row(name, config, found[name]))
            print(f"| {' | '.join(rows[-1])} |", flush=True)
            if found[name]["said"]:
                print(found[name]["said"], flush=True)
    device = torch.cuda.get_device_name() if a.device == "cuda" else "CPU"
    facts = {"device": device, "model": a.model, "resolution": resolution, "processes": a.processes}
    a.out.parent.mkdir(parents=True, exist_ok=True)
    result = {**facts, "runs": found, "environment": environment()}
    a.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    title = f"# Packaged {FAMILY[a.model]} configs on random weights: {a.model} at {resolution} px, {device}"
    a.out.with_suffix(".md").write_text(f"{title}\n\n{table(HEAD, rows)}")
    sys.exit(0 if all(each["ok"] for each in found.values()) else 1)


if __name__ == "__main__":
    main()
