"""The speed of a training step: ours and the peer's, in one process on the same weights and pairs.

    python -m benchmarks.step --device cpu --model tiny                            # a minute or two, anywhere
    python -m benchmarks.step --device cuda --model sdxl --mixed-precision bf16 --peer train_diffusion_dpo_sdxl.py
    python -m benchmarks.step --device cuda --model sdxl --tuning full --mixed-precision bf16 --ladder
    python -m benchmarks.step --device cuda --model sdxl --growth

Contenders take turns (A B A B …). The speed is pairs per second of whole steps, from the data to the update. The peer
is its own script if --peer gives it, else a replica of its loop (`peer.py`). It runs as published (its README's
command: gradient checkpointing, rank 8, batches of 8) and tuned (no checkpointing). Ours reads the latent cache. Its
second row also reads the reference's errors at repeated draws, and evaluates no reference in a step. Both caches are
filled before timing starts, and the seconds for that stand beside each row. No test depends on these speeds.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml

from benchmarks import counts
from benchmarks.ladder import KEPT_ERRORS, growing, rungs
from benchmarks.live import LiveScript, let_torchvision_in
from benchmarks.models import MODELS, model_folder, pairs_file
from benchmarks.ours import Ours, make_config
from benchmarks.peer import Peer, PeerSettings
from benchmarks.report import Machine, Row, write
from benchmarks.timing import Timed, copy_rate, kernels, matmul_rate, parts, processor_ratio, ratio, take_turns
from diffalign.data.table.file_hash import SETTLED
from diffalign.models.adapters.lora import lora_layers
from diffalign.objectives import OBJECTIVES

PUBLISHED = "peer as published"
REPLICA = "replica of the peer"
TUNED = "peer without checkpointing"
OURS = "ours"
KEPT = "ours, reference errors kept"
ATTENTION = ("attention", "flash", "fmha", "sdpa", "cudnn")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    a = parser().parse_args(arguments)
    if a.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if a.peer is not None:
        let_torchvision_in()
    with tempfile.TemporaryDirectory() as temporary:
        Benchmark(a, a.work or Path(temporary)).run()


class Benchmark:
    """One command: models and pairs on disk, contenders, rows."""

    def __init__(self, a: argparse.Namespace, work: Path) -> None:
        self.a, self.work = a, work
        self.device = torch.device(a.device)
        self.resolution = a.resolution or MODELS[a.model]
        work.mkdir(parents=True, exist_ok=True)
        self.folder = model_folder(a.model, work / a.model)
        pictures = a.picture_size or self.resolution
        data = work / f"pairs-{pictures}" / "train.parquet"
        self.data = data if data.is_file() else pairs_file(data, a.data_pairs, pictures)
        dtype = torch.bfloat16 if a.mixed_precision == "bf16" else torch.float32
        self.machine = Machine(matmul_rate(self.device, dtype), copy_rate(self.device))
        self.before: dict[str, float] = {}  # seconds of each row before its clock starts
        self._network: dict[int, dict[str, Any]] = {}  # by side of the latents

    def run(self) -> None:
        """Measures what was asked for and writes it."""
        rows: list[Row] = []
        ratios: dict[str, Any] = {}
        if self.a.ladder:
            full = self.a.tuning == "full"
            found = rungs(self.device.type, self.a.pairs, self.a.tuning, self.a.mixed_precision)
            for lever, settings in found:
                row = self.alone(lever.name, settings)
                row.predicted_ms = lever.predicted_full if full else lever.predicted_lora
                rows.append(row)
        elif self.a.growth:
            for name, (key, values) in growing(self.resolution).items():
                rows += [self.alone(f"{name}: {value}", {key: value}) for value in values]
            rows += [self.stored(pairs) for pairs in self.a.records]
        else:
            rows, ratios = self.contest()
        facts = {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "model": self.a.model,
            "resolution": self.resolution,
            "picture_size": self.a.picture_size or self.resolution,
            "objective": self.a.objective,
            "tuning": self.a.tuning,
            "mixed_precision": self.a.mixed_precision,
            "peer": "the script" if self.a.peer else "replica",
        }
        title = f"A step of {self.a.model} at {self.resolution} px, {self.a.tuning}, {self.a.objective}"
        print(write(self.a.out, title, rows, ratios, self.machine, facts))

    def contest(self) -> tuple[list[Row], dict[str, Any]]:
        """Ours against the peer, turn by turn."""
        cache = {"data.cache_dir": str(self.work / f"cache-{time.time_ns()}")}
        ours = {OURS: self.ours(OURS, cache)}
        objective = ours[OURS].run.objective
        if objective.drawn is not None and objective.needs_reference:
            ours[KEPT] = self.ours(KEPT, {**cache, **KEPT_ERRORS})
        steps: dict[str, Callable[[], None]] = {}
        closing = []
        if self.has_peer:
            for name in self.peers():
                begun = time.perf_counter()
                contender = self.peer(name)
                self.before[name] = time.perf_counter() - begun
                closing.append(getattr(contender, "close", lambda: None))
                steps[name] = contender.step
        steps |= {name: contender.step for name, contender in ours.items()}
        timed = take_turns(steps, warmup=self.a.warmup, steps=self.a.steps, rounds=self.a.rounds, device=self.device)
        rows = [self.row(name, timed[name], steps[name], ours.get(name, ours[OURS])) for name in steps]
        for close in closing:
            close()
        ratios = {}
        for own in ours:
            for name in [n for n in steps if n != own and n != KEPT]:
                ratios[f"{own} against {name}"] = ratio(timed[name], timed[own])
                if self.device.type == "cpu":
                    ratios[f"{own} against {name}, in CPU time"] = processor_ratio(timed[name], timed[own])
        return rows, ratios

    def peers(self) -> tuple[str, ...]:
        """The peer's rows. The script keeps global state, so it has one; its replica can be tuned beside it."""
        if self.a.peer is None:
            return PUBLISHED, TUNED
        return (PUBLISHED, REPLICA, TUNED) if self.a.replica else (PUBLISHED,)

    @property
    def has_peer(self) -> bool:
        """Whether the peer's script could do this run at all."""
        return self.a.model in ("tiny", "small", "sdxl") and self.a.tuning == "lora" and self.a.objective == "dpo"

    def alone(self, name: str, settings: dict[str, Any]) -> Row:
        """A row of ours with some settings, measured by itself."""
        ours = self.ours(name, settings)
        steps = {name: ours.step}
        timed = take_turns(steps, warmup=self.a.warmup, steps=self.a.steps, rounds=self.a.rounds, device=self.device)
        row = self.row(name, timed[name], ours.step, ours)
        row.settings = settings
        del ours, steps
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return row

    def stored(self, pairs: int) -> Row:
        """A row with a cache of so many pairs, opened a second time: what a run waits for and holds once it is made."""
        kept, pictures = self.data, self.a.picture_size or self.resolution
        self.data = self.work / f"pairs-{pictures}-{pairs}" / "train.parquet"
        if not self.data.is_file():
            pairs_file(self.data, pairs, pictures)
            time.sleep(SETTLED)  # what was found in younger files is not remembered
        name, cache = f"pairs in the cache: {pairs}", {"data.cache_dir": str(self.work / f"cache-{time.time_ns()}")}
        self.ours(name, cache)
        row = self.alone(name, cache)
        row.settings = {}  # a temporary folder is none
        self.data = kept
        return row

    def ours(self, name: str, settings: dict[str, Any]) -> Ours:
        """Our contender; its caches are filled here, off the clock."""
        a = self.a
        overrides = {
            "tuning.method": a.tuning,
            "objective": {"name": a.objective},
            "data.resolution": self.resolution,
            "training.train_batch_size": a.pairs,
            "training.mixed_precision": a.mixed_precision,
            **({"tuning.rank": a.rank} if a.tuning == "lora" else {}),
            **dict(a.settings),
            **settings,
        }
        begun = time.perf_counter()
        ours = Ours(make_config(self.folder, self.data, self.work / f"run-{time.time_ns()}", overrides))
        self.before[name] = time.perf_counter() - begun
        if ours.device.type != self.device.type:
            raise SystemExit(
                f"--device {self.device.type}, but accelerate chose {ours.device}; set CUDA_VISIBLE_DEVICES"
            )
        return ours

    def peer(self, name: str) -> Any:
        """The peer's script or its replica, for a row of this name."""
        a = self.a
        settings = PeerSettings(
            resolution=self.resolution,
            train_batch_size=a.pairs,
            rank=a.rank,
            learning_rate=1e-5,
            gradient_checkpointing=name != TUNED,
            mixed_precision=a.mixed_precision,
        )
        if a.peer is None or name != PUBLISHED:
            return Peer(self.folder, self.data, settings, self.device)
        return LiveScript(a.peer, self.folder, self.data, self.work / "peer", settings)

    def row(self, name: str, timed: Timed, step: Callable[[], None], ours: Ours) -> Row:
        """A row from what was timed, what must be computed, and where the time went."""
        unet, training = ours.run.unet, ours.run.config.training
        rank = self.a.rank if lora_layers(unet) else None
        side = next(ours.run.source.batches()).latents.shape[-1]
        rows = counts.objective_rows(ours.run.objective, transitions=self.a.objective == "spo")
        if side not in self._network:
            meta = counts.meta_unet(dict(unet.config), rank)
            self._network[side] = {
                "flops": counts.flops_of(meta, side, 2 if rows.shared_text else 1),
                "kept": counts.kept_bytes(meta, counts.unet_inputs(meta, 1, side)),
            }
        network = self._network[side]
        if ours.run.config.data.cache_reference_errors:
            rows = replace(rows, reference=0, reference_calls=0)
        micro = training.gradient_accumulation_steps
        pairs = training.train_batch_size * micro
        calls = (2 * rows.policy_calls + rows.reference_calls) * micro
        return Row(
            name=name,
            pairs=pairs,
            **timed.summary(),
            peak_bytes=timed.peak,
            useful_flops=counts.useful_flops(rows, network["flops"]),
            floor_bytes=counts.least_bytes(unet, rows, network["kept"], pairs, calls),
            before_seconds=self.before.get(name, 0.0),
            largest_part=_largest(parts(step, self.device)),
            kernels=kernels(step, self.device, ATTENTION),
        )


def _largest(found: list[tuple[str, float]]) -> str:
    """The largest kind of operator; a script's thread is not seen by the profiler of a CPU."""
    return "{}, {:.0%}".format(*found[0]) if found else "-"


def setting(text: str) -> tuple[str, Any]:
    """`section.key=value`, the value as YAML."""
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise argparse.ArgumentTypeError(f"{text!r}: write section.key=value, as on diffalign's command line")
    return key, yaml.safe_load(value)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--model", choices=tuple(MODELS), default="tiny")
    p.add_argument("--resolution", type=int, help="pixels; default: the model's own")
    p.add_argument("--picture-size", type=int, help="pixels of the pictures on disk; default: the resolution")
    p.add_argument("--objective", choices=tuple(OBJECTIVES), default="dpo")
    p.add_argument("--tuning", choices=("lora", "full"), default="lora")
    p.add_argument("--rank", type=int, default=8, help="of the LoRA, ours and the peer's")
    p.add_argument("--pairs", type=int, default=8, help="in a micro-batch")
    p.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    p.add_argument("--set", dest="settings", type=setting, action="append", default=[], metavar="section.key=value",
                   help="a setting of our config, e.g. a lever")  # fmt: skip
    p.add_argument("--peer", type=Path, help="diffusers' train_diffusion_dpo_sdxl.py; default: the replica")
    p.add_argument("--replica", action="store_true", help="with --peer: its replica too, as published and tuned")
    p.add_argument("--ladder", action="store_true", help="our levers, one more at a time")
    p.add_argument("--growth", action="store_true", help="ours at growing batches, pictures and caches")
    p.add_argument("--records", type=int, nargs="*", default=[100, 1000, 10000],
                   help="of --growth: pairs in the cache; each is made and encoded first")  # fmt: skip
    p.add_argument("--warmup", type=int, default=5, help="untimed steps of each contender")
    p.add_argument("--steps", type=int, default=5, help="timed steps of a turn")
    p.add_argument("--rounds", type=int, default=4, help="turns of each contender")
    p.add_argument("--data-pairs", type=int, default=64, help="pairs on disk")
    p.add_argument("--work", type=Path, help="folder for models, pairs and caches, kept; default: a temporary one")
    p.add_argument("--out", type=Path, default=Path("runs/benchmark_step"), help="OUT.json and OUT.md")
    return p


if __name__ == "__main__":
    main()
