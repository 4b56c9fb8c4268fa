"""The final weights of a run: written beside their place, flushed to the disk, renamed; the manifest comes last.

A run is finished when its manifest is there and names files that are there in the size that was written. So a kill at
any moment leaves the weights of before, or none, or whole ones, and only in the last case a finished run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from diffalign.io import manifest
from diffalign.io.files import list_files, remove, room_for, sync, sync_folder, take_place, temporary
from diffalign.io.manifest import MANIFEST
from diffalign.models.adapters.methods import known_layouts
from diffalign.rewards.step_aware import WEIGHTS_FOLDER
from diffalign.training.build_source import SOURCE_FOLDER
from diffalign.training.callbacks.recovery import HEALTH_FILE, METRICS_FILE
from diffalign.training.checkpoints.checkpoint import NO_ROOM, CheckpointError, checkpoints, sweep


def weight_names() -> list[str]:
    """The files and folders that hold final weights, of any kind of run."""
    return [name for layout in known_layouts() for name in layout.names] + [WEIGHTS_FOLDER]


def save_final_weights(output_dir: Path, step: int, write: Callable[[Path], object], needed: int = 0) -> None:
    """Puts what `write` writes into a folder (about `needed` bytes) into `output_dir`, and its manifest last.

    Raises NoSpaceError, which leaves the folder as it is.
    """
    partial = temporary(output_dir / "final")
    try:
        with room_for(output_dir, needed, "the final weights", NO_ROOM):
            partial.mkdir(parents=True)
            write(partial)
            sync(partial)
            names = sorted(path.name for path in partial.iterdir())
            manifest.write_manifest(partial, {"step": step, "files": list_files(partial)})
        (output_dir / MANIFEST).unlink(missing_ok=True)
        for name in names:
            take_place(partial / name, output_dir / name)
        os.replace(partial / MANIFEST, output_dir / MANIFEST)
        sync_folder(output_dir)
    finally:
        remove(partial)


def is_finished(output_dir: Path) -> bool:
    """Whether a run came to its end there: its final weights and their manifest are there."""
    return manifest.fault(output_dir, hashes=False) is None


def has_final_weights(output_dir: Path) -> bool:
    """Whether anything lies where final weights do; `is_finished` says whether they are whole."""
    return any((output_dir / name).exists() for name in weight_names())


def refuse_finished(output_dir: Path) -> None:
    """Raises CheckpointError where weights without a checkpoint lie, which a run from step 0 would replace."""
    if not has_final_weights(output_dir):
        return
    state = "a finished run"
    if not is_finished(output_dir):
        state = f"weights that are not known to be whole ({manifest.fault(output_dir, hashes=False)})"
    raise CheckpointError(
        f"training.resume_from_checkpoint: {output_dir} holds {state} without checkpoints; set "
        "overwrite_output_dir=true to run it again, or name another output_dir"
    )


def clear_output(output_dir: Path) -> None:
    """Removes what an earlier run left in its folder: checkpoints, metrics, pictures and final weights.

    Only for a folder that holds a run; `training.run.claim` sees to that.
    """
    for old in checkpoints(output_dir):
        shutil.rmtree(old)
    for name in weight_names():
        remove(output_dir / name)
    for name in ("logs", "validation", SOURCE_FOLDER):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    for name in (MANIFEST, METRICS_FILE, HEALTH_FILE, "config.yaml", "run.json"):
        (output_dir / name).unlink(missing_ok=True)
    sweep(output_dir)
