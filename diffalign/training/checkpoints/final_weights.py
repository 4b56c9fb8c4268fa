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
from diffalign.models.adapters.lora_file import LORA_FILE
from diffalign.models.adapters.save_load import UNET_FOLDER
from diffalign.models.adapters.user_attention import USER_FILE
from diffalign.rewards.step_aware import WEIGHTS_FOLDER
from diffalign.training.build_source import SOURCE_FOLDER
from diffalign.training.callbacks.recovery import HEALTH_FILE, METRICS_FILE
from diffalign.training.checkpoints.checkpoint import NO_ROOM, CheckpointError, checkpoints, sweep

WEIGHTS = (UNET_FOLDER, WEIGHTS_FOLDER)  # final weights of any kind of run, as folders
WEIGHT_FILES = (LORA_FILE, USER_FILE)


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
    folders, files = ((output_dir / name for name in names) for names in (WEIGHTS, WEIGHT_FILES))
    return any(path.is_dir() for path in folders) or any(path.is_file() for path in files)


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
    for name in (*WEIGHTS, "logs", "validation", SOURCE_FOLDER):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    for name in (MANIFEST, *WEIGHT_FILES, METRICS_FILE, HEALTH_FILE, "config.yaml", "run.json"):
        (output_dir / name).unlink(missing_ok=True)
    sweep(output_dir)
