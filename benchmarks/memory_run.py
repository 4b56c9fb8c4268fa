"""The memory of the presets' training steps on a device, beside the counted memory; random weights, a few steps each.

    python -m benchmarks.memory_run --model sdxl                  # on CUDA, with 80 GB for all rows
    python -m benchmarks.memory_run --model tiny --device cpu     # the same without figures

Each preset runs unchanged, except for weights, pairs and two micro-steps a step: it fills its latent cache, computes
reference errors in advance if the preset does, and takes steps. On CUDA the allocator may use no more than the
preset's card has, less what a CUDA context needs; "fits" says whether that was enough. "Allocated" is the peak of the
tensors, "reserved" the peak that the allocator requested from the device. Both are given from the start of the build,
and for the steps alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.memory import GB, GIB, card_of, count, presets, table
from benchmarks.models import MODELS, model_folder, pairs_file
from benchmarks.ours import Ours, on_random_weights
from diffalign.config.schema import Config, load_config
from diffalign.training.run import environment

CONTEXT = 0.6 * GIB  # of a card, for CUDA's context and libraries: outside the allocator
FIGURES = ("built_allocated", "built_reserved", "allocated", "reserved")
HEAD = ["preset", "counted, GB", "allocated", "reserved", "allocated at first", "reserved at first", "fits", "s a step"]


def preset_config(path: Path, folder: Path, data: Path, work: Path, resolution: int) -> Config:
    """The config of a preset for a model folder and pairs that are here."""
    config = load_config(
        path,
        [
            *on_random_weights(folder, data, resolution, work / path.stem),
            f"data.cache_dir={work / path.stem / 'cache'}",
            "data.dataloader_num_workers=0",
        ],
    )
    assert isinstance(config, Config), "presets tune a base"
    return config


def measure(name: str, config: Config, device: torch.device, steps: int) -> dict[str, Any]:
    """A preset's row: counted bytes, measured bytes (null on a CPU, which has no such allocator), seconds of a step."""
    row: dict[str, Any] = {"preset": name, **dict.fromkeys((*FIGURES, "fits", "seconds"))}
    cuda, card = device.type == "cuda", card_of(name)
    if cuda:
        total = torch.cuda.get_device_properties(device).total_memory
        allowed = total if card is None else min(card * GIB - CONTEXT, total)
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        torch.cuda.reset_peak_memory_stats()
    try:
        ours = Ours(config)
        if cuda:
            row |= _peaks("built_")
            torch.cuda.reset_peak_memory_stats()
        begun = 0.0
        for step in range(steps + 1):
            if step == 1:  # the first one makes the optimiser's states and chooses kernels
                begun = _now(cuda)
            ours.step()
        row["seconds"] = (_now(cuda) - begun) / steps
        if cuda:
            row |= {**_peaks(""), "fits": True}
        row["counted"] = count(config, dict(ours.run.unet.config))
    except torch.OutOfMemoryError:
        row |= {**_peaks(""), "fits": False}
    return row


def _peaks(when: str) -> dict[str, int]:
    return {f"{when}allocated": torch.cuda.max_memory_allocated(), f"{when}reserved": torch.cuda.max_memory_reserved()}


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("configs", nargs="*", type=Path, help="default: the presets of training_configs/sdxl/memory")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--model", choices=("tiny", "small", "sdxl"), default="tiny")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--work", type=Path, help="folder for models, pairs and caches, kept; default: a temporary one")
    p.add_argument("--out", type=Path, default=Path("runs/memory_run"), help="OUT.json and OUT.md")
    a = p.parse_args(arguments)
    device, resolution, rows = torch.device(a.device), MODELS[a.model], []
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        folder = model_folder(a.model, work / a.model)
        data = pairs_file(work / "pairs" / "train.parquet", 8, resolution)
        for name, path in presets(a.configs).items():
            rows.append(measure(name, preset_config(path, folder, data, work, resolution), device, a.steps))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    named = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    facts = {"device": named, "model": a.model, "resolution": resolution, "steps": a.steps}
    a.out.parent.mkdir(parents=True, exist_ok=True)
    result = {**facts, "rows": rows, "environment": environment()}
    a.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    text = f"{a.model} at {resolution} px on {named}, GB of 10^9 bytes\n\n" + table(HEAD, [_cells(row) for row in rows])
    a.out.with_suffix(".md").write_text(text)
    print(text)


def _cells(row: dict[str, Any]) -> list[str]:
    def size(value: int | None) -> str:
        return "" if value is None else f"{value / GB:.2f}"

    told = {None: "", True: "yes", False: "no"}[row["fits"]]
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
    measured = [size(row[name]) for name in ("allocated", "reserved", "built_allocated", "built_reserved")]
    return [row["preset"], size(row.get("counted", {}).get("sum")), *measured, told, seconds]


if __name__ == "__main__":
    main()
