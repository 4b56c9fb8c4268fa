"""The final weights of a run: written beside their final path, flushed to the disk, then renamed; the manifest is last.

A run is finished when its manifest exists and names files that exist with the sizes that were written. So a kill at
any moment leaves the previous weights, or none, or complete ones, and only in the last case a finished run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from diffalign.export.card.write import CARD, STRIP, is_ours
from diffalign.io import manifest
from diffalign.io.files import list_files, remove, room_for, share, sync, sync_folder, take_place, temporary
from diffalign.io.manifest import MANIFEST
from diffalign.models.adapters.methods import known_layouts
from diffalign.training.build_source import SOURCE_FOLDER
from diffalign.training.checkpoints.checkpoint import BEST, NO_ROOM, CheckpointError, checkpoints, remove_partial
from diffalign.training.metrics import HEALTH_FILE, MARGINS_FILE, METRICS_FILE, RUN_PAGE, TIMING_FILE

PREFERENCE_MODEL = "preference_model"  # the folder that a run which trains one writes


def weight_names() -> list[str]:
    """The files and folders that hold final weights, of any kind of run."""
    return [name for layout in known_layouts() for name in layout.names] + [PREFERENCE_MODEL]


def save_final_weights(output_dir: Path, step: int, write: Callable[[Path], object], needed: int = 0) -> None:
    """Puts what `write` writes into a folder (about `needed` bytes) into `output_dir`, and its manifest last.

    Raises NoSpaceError, which leaves the folder as it is.
    """
    partial = temporary(output_dir / "final")
    try:
        with room_for(output_dir, needed, "the final weights", NO_ROOM):
            partial.mkdir(parents=True)
            write(partial)
            share(partial)
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
    """Whether the folder has the final weights of a run and their manifest."""
    return manifest.fault(output_dir, hashes=False) is None


def has_final_weights(output_dir: Path) -> bool:
    """Whether there is anything at the paths of final weights; `is_finished` checks that they are complete."""
    return any((output_dir / name).exists() for name in weight_names())


def refuse_finished(output_dir: Path) -> None:
    """Raises CheckpointError for weights without a checkpoint, which a run from step 0 would replace."""
    if not has_final_weights(output_dir):
        return
    state = "a finished run"
    if not is_finished(output_dir):
        state = f"weights that may be incomplete ({manifest.fault(output_dir, hashes=False)})"
    raise CheckpointError(
        f"training.resume_from_checkpoint: {output_dir} contains {state} without checkpoints; set "
        "overwrite_output_dir=true to run it again, or name another output_dir"
    )


def clear_output(output_dir: Path) -> None:
    """Removes what an earlier run left in its folder: checkpoints, metrics, images, final weights and an unedited card.

    Only for the folder of a run, which `training.run.claim` checks.
    """
    for old in checkpoints(output_dir):
        shutil.rmtree(old)
    for name in weight_names():
        remove(output_dir / name)
    for name in ("logs", "validation", BEST, SOURCE_FOLDER):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    records = (METRICS_FILE, MARGINS_FILE, TIMING_FILE, HEALTH_FILE)
    for name in (MANIFEST, *records, RUN_PAGE, "config.yaml", "run.json"):
        (output_dir / name).unlink(missing_ok=True)
    if is_ours(output_dir / CARD):
        for name in (CARD, STRIP):
            (output_dir / name).unlink(missing_ok=True)
    remove_partial(output_dir)
