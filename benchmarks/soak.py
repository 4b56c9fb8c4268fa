"""Does a long run grow? Memory, open files, threads and folders along runs on the embedded world.

    python -m benchmarks.soak --out runs/soak                        # 3,000 steps and 30 online rounds
    python -m benchmarks.soak --out runs/soak --steps 200 --rounds 4

Two runs with everything on that repeats: metrics and the run page at every log, checkpoints (two stay), held-out pairs,
validation images, an EMA; the first reads a latent cache, the second generates its pairs. Each runs in a process of its
own. Slopes are by least squares over the samples after the first fifth, which warms up (allocator, caches of kernels,
modules that are imported at their first use); `±` is the standard error of a slope, as if samples were independent.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from diffalign.config.schema import load_config
from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.run import environment, run_training

WARM_UP = 0.2  # share of the samples that slopes leave out
MB = 1e6
CONFIGS = Path(__file__).parent.parent / "training_configs" / "world"
REPEATED = {  # at the end of a round or a few, so that all of it happens often
    "training.ema_decay": "0.99",
    "training.checkpoints_total_limit": "2",
    "training.report_to": "none",
    "validation.prompts": '["the circle is red"]',
    "validation.num_inference_steps": "2",
    "overwrite_output_dir": "true",
}
STEPS = {"training.train_batch_size": "8", "validation.pairs": "0.05", "validation.max_pairs": "16"}
ROUNDS = {
    "source.prompts_per_round": "32",
    "source.samples_per_prompt": "2",
    "source.sampling_steps": "4",
    "training.train_batch_size": "4",
}
STEPS_PER_ROUND = 8


@dataclass(frozen=True)
class Sample:
    """What a process has at one step."""

    step: int
    rss: float  # MB of 10^6 bytes
    files: int  # open file descriptors
    maps: int  # memory maps
    threads: int
    cache: float  # MB in the folders that the run writes beside its output
    output: float  # MB of its output


class Probe(Callback):
    """Takes a sample every so many steps."""

    def __init__(self, every: int, cache: Path) -> None:
        self.every, self.cache, self.samples = every, cache, list[Sample]()

    def on_step_end(self, state: TrainingState) -> None:
        """Before the step's log and checkpoint, so that no file of them is open."""
        if state.step % self.every == 0:
            self.samples.append(sample(state.step, self.cache, state.run.output_dir))


def sample(step: int, cache: Path, output: Path) -> Sample:
    """Of this process, from /proc."""
    me = Path("/proc/self")
    resident = int((me / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    maps = len((me / "maps").read_text().splitlines())
    return Sample(
        step,
        resident / MB,
        len(list((me / "fd").iterdir())),
        maps,
        len(list((me / "task").iterdir())),
        folder_bytes(cache) / MB,
        folder_bytes(output) / MB,
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope by least squares and its standard error."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    centred = a - a.mean()
    total = float((centred**2).sum())
    found = float((centred * b).sum()) / total
    rest = b - b.mean() - found * centred
    return found, float(np.sqrt((rest**2).sum() / max(len(a) - 2, 1) / total))


def settings(kind: str, steps: int, out: Path) -> dict[str, str]:
    """Overrides of a packaged config."""
    each = max(steps // 60, 1) if kind == "steps" else STEPS_PER_ROUND
    own = {**STEPS, "data.cache_dir": str(out / "cache"), "validation.pairs_every": str(each)}
    return {
        **REPEATED,
        **(own if kind == "steps" else ROUNDS),
        "output_dir": str(out / "run"),
        "training.max_train_steps": str(steps),
        "training.logging_steps": str(each),
        "training.checkpointing_steps": str(each),
        "validation.every": str(each),
    }


def soak(kind: str, steps: int, out: Path) -> dict[str, Any]:
    """Samples of one run, and its slopes per 1,000 steps. kind: "steps" or "rounds"."""
    shutil.rmtree(out, ignore_errors=True)
    config = load_config(
        CONFIGS / ("dpo.yaml" if kind == "steps" else "online_dpo.yaml"),
        [f"{key}={value}" for key, value in settings(kind, steps, out).items()],
    )
    probe = Probe(max(steps // 150, 1), out / "cache")
    began = time.process_time()
    run_training(config, callbacks=[probe])
    kept = probe.samples[int(WARM_UP * len(probe.samples)) :]
    at = [one.step / 1000 for one in kept]
    slopes = {name: slope(at, [getattr(one, name) for one in kept]) for name in ("rss", "files", "maps", "threads")}
    return {
        "steps": steps,
        "cpu_seconds": round(time.process_time() - began, 1),
        "per_1000_steps": {name: {"slope": a, "error": b} for name, (a, b) in slopes.items()},
        "samples": [asdict(one) for one in probe.samples],
    }


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """Lines of the table."""
    lines = []
    for name, one in found.items():
        samples = one["samples"]
        start, end = samples[int(WARM_UP * len(samples))], samples[-1]
        for what, unit in (("rss", " MB"), ("files", ""), ("maps", ""), ("threads", ""), ("cache", " MB")):
            given = one["per_1000_steps"].get(what)
            change = "" if given is None else f"{given['slope']:+.3f} ± {given['error']:.3f}{unit}"
            first, last = (f"{each[what]:.1f}{unit}" if unit else f"{each[what]}" for each in (start, end))
            lines.append([name, str(one["steps"]), what, first, last, change])
    return lines


def write(out: Path, found: dict[str, Any]) -> None:
    """soak.json and soak.md."""
    from benchmarks.memory import table

    out.mkdir(parents=True, exist_ok=True)
    (out / "soak.json").write_text(json.dumps({**found, "environment": environment()}) + "\n")
    text = table(["run", "steps", "what", "after the warm-up", "at the end", "per 1,000 steps"], rows_of(found))
    (out / "soak.md").write_text(f"    python -m benchmarks.soak --out runs/soak\n\n{text}")
    print(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--rounds", type=int, default=30)
    a = p.parse_args(arguments)
    found = {}
    for kind, steps in (("steps", a.steps), ("rounds", a.rounds * STEPS_PER_ROUND)):
        found[kind] = _in_own_process(kind, steps, (a.out / "work" / kind).resolve())
    shutil.rmtree(a.out / "work")
    write(a.out, found)


def _in_own_process(kind: str, steps: int, out: Path) -> dict[str, Any]:
    from benchmarks.forked import in_child

    note = out.with_suffix(".json")

    def work() -> None:
        found = soak(kind, steps, out)
        note.write_text(json.dumps(found))

    in_child(work)
    found: dict[str, Any] = json.loads(note.read_text())
    return found


if __name__ == "__main__":
    main()
