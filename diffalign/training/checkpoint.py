"""Checkpoints: weights in the format everybody loads, and beside them what only resuming needs.

    output_dir/checkpoint-N/unet/ or pytorch_lora_weights.safetensors    usable by `diffalign generate` as it is
    output_dir/checkpoint-N/config.yaml                                  the settings, resolved
    output_dir/checkpoint-N/training_state.pt                            optimiser, lr schedule, scaler, EMA, step
    output_dir/checkpoint-N/source.json                                  where a source that makes its pairs stands

The order of the data and every draw follow from (seed, step), so neither needs saving. A checkpoint is written to a
hidden folder and renamed, so a killed run leaves no half of one. The state file is read with `weights_only=True`.
Left out: sharded (FSDP, DeepSpeed) states.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffalign.errors import DiffalignError

log = logging.getLogger(__name__)

STATE_FILE = "training_state.pt"
SOURCE_FILE = "source.json"


class CheckpointError(DiffalignError):
    """A checkpoint that is not there or does not fit the run."""


def checkpoints(output_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if (p / STATE_FILE).is_file()), key=_step)


def save_checkpoint(
    output_dir: Path,
    step: int,
    save_weights: Callable[[Path], None],
    state: dict[str, Any],
    total_limit: int | None = None,
    source: dict[str, Any] | None = None,
) -> Path:
    """Writes checkpoint-`step`, with the source's state if it has any; then removes the oldest beyond `total_limit`."""
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f".checkpoint-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_weights(partial)
    torch.save({**state, "step": step}, partial / STATE_FILE)
    if source:
        (partial / SOURCE_FILE).write_text(json.dumps(source) + "\n")
    replaced = output_dir / f".checkpoint-{step}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    if total_limit is not None:
        for old in [p for p in checkpoints(output_dir) if p != final][: -(total_limit - 1) or None]:
            shutil.rmtree(old)
    return final


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """The folder to resume from: "latest" is the newest of the run (None where there is none yet), else a path.

    Raises CheckpointError when a named folder is no finished checkpoint.
    """
    if resume == "latest":
        return (checkpoints(output_dir) or [None])[-1]
    for path in (output_dir / resume, Path(resume)):
        if (path / STATE_FILE).is_file():
            return path
    there = ", ".join(p.name for p in checkpoints(output_dir)) or "none"
    raise CheckpointError(
        f"training.resume_from_checkpoint: {resume} is no finished checkpoint (no {STATE_FILE} in it); "
        f"this run has: {there}. Give one of these, a path, or latest"
    )


def set_aside(output_dir: Path, step: int) -> None:
    """Renames checkpoints after `step` to checkpoint-N.abandoned: a resumed run will write its own."""
    for newer in [p for p in checkpoints(output_dir) if _step(p) > step]:
        abandoned = newer.with_name(f"{newer.name}.abandoned")
        shutil.rmtree(abandoned, ignore_errors=True)
        newer.rename(abandoned)
        log.info("%s is of the run before this one resumed at step %d: kept as %s", newer.name, step, abandoned.name)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The training state of a checkpoint, on the CPU."""
    return torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)


def load_source_state(checkpoint: Path) -> dict[str, Any]:
    """Where the run's source stood; empty for pairs that were there before the run."""
    file = checkpoint / SOURCE_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def source_states(output_dir: Path) -> list[dict[str, Any]]:
    """The source's state in each finished checkpoint that has one."""
    return [state for checkpoint in checkpoints(output_dir) if (state := load_source_state(checkpoint))]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))
