"""Checkpoints: weights in diffusers' layout, and beside them what only resuming needs.

    output_dir/checkpoint-N/unet/ or pytorch_lora_weights.safetensors    which `diffalign generate` takes
    output_dir/checkpoint-N/config.yaml                                  the settings, resolved
    output_dir/checkpoint-N/training_state.pt                            optimiser, lr schedule, scaler, EMA, step
    output_dir/checkpoint-N/sharded/                                     sharded states (`distributed/sharded_state.py`)
    output_dir/checkpoint-N/source.json                                  the state of a source that generates its pairs
    output_dir/checkpoint-N/best/                                        the best weights so far, by held-out pairs
    output_dir/checkpoint-N/manifest.json                                sizes and hashes of all of these

The order of the data and every draw follow from (seed, step), so neither needs saving. A checkpoint is written to a
hidden folder, flushed to the disk and renamed, so a killed run leaves no half of one. Before anything of one is loaded
its files are compared with its manifest. The state file is read with `weights_only=True`.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.io import manifest
from diffalign.io.files import PARTIAL, list_files, remove, sync, written_whole
from diffalign.io.manifest import MANIFEST
from diffalign.training.checkpoints.background import at_once

log = logging.getLogger(__name__)

STATE_FILE = "training_state.pt"
SOURCE_FILE = "source.json"
BEST = "best"  # folder of the best weights by held-out pairs, in a run's folder and in each checkpoint
NO_ROOM = "the checkpoints there are intact. Free some space, or name an output_dir on another disk, and resume"
_logged: set[tuple[Path, str]] = set()  # damage that was logged already
_checked: dict[Path, tuple[object, str | None]] = {}  # sizes and times of a checkpoint's files, and its damage


class CheckpointError(DiffalignError):
    """A checkpoint that is missing, damaged or does not fit the run."""


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, damaged ones included."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if (p / STATE_FILE).is_file() or (p / MANIFEST).is_file()), key=_step)


@dataclass(frozen=True)
class Checkpoint:
    """What goes into a checkpoint."""

    step: int
    save_weights: Callable[[Path], None]  # writes the weights into a folder
    state: dict[str, Any]  # tensors and plain values, for `training_state.pt`
    source: dict[str, Any] = field(default_factory=dict)  # the state of a source that generates its pairs
    identity: dict[str, Any] = field(default_factory=dict)  # hashes of data and base, compared on resuming
    weights_bytes: int = 0  # size of what `save_weights` writes


def save_checkpoint(
    output_dir: Path,
    content: Checkpoint,
    total_limit: int | None = None,
    finish: Callable[[Callable[[], None]], None] = at_once,
) -> Path:
    """Writes checkpoint-`content.step`, then removes the oldest beyond `total_limit`.

    finish: is given what is left to do once the files are written, down to the removal; see `background.py`.
    Raises NoSpaceError, which leaves the earlier checkpoints as they are.
    """
    final = output_dir / f"checkpoint-{content.step}"
    state = {**content.state, "step": content.step, "manifest": manifest.FORMAT}
    with ExitStack() as writing:
        needed = content.weights_bytes + tensor_bytes(state)
        partial = writing.enter_context(written_whole(final, needed, final.name, NO_ROOM))
        partial.mkdir()
        content.save_weights(partial)
        torch.save(state, partial / STATE_FILE)
        if content.source:
            (partial / SOURCE_FILE).write_text(json.dumps(content.source) + "\n")
        rest = writing.pop_all()

    def end() -> None:
        with rest:
            sync(partial)
            files = {"step": content.step, "identity": content.identity, "files": list_files(partial)}
            manifest.write_manifest(partial, files)
        if total_limit is not None:
            _remove_beyond(output_dir, total_limit, final)

    finish(end)
    return final


def _remove_beyond(output_dir: Path, limit: int, newest: Path) -> None:
    """Removes what is older than `limit` intact checkpoints, of which `newest`, just written, is one.

    Damaged ones do not count, so an intact one is never removed in favour of them.
    """
    intact = 1
    for path in [p for p in reversed(checkpoints(output_dir)) if p != newest]:
        if intact < limit:
            intact += damage(path, hashes=False) is None
            continue
        condemned = path.with_name(f".{path.name}.removed")  # a kill while removing leaves no half of it
        path.rename(condemned)
        remove(condemned)


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """The folder to resume from: a path, or for "latest" the newest intact one of the run, None where there is none.

    Raises CheckpointError when a named folder is no checkpoint or is damaged, and when all checkpoints are damaged.
    """
    there = checkpoints(output_dir)
    if resume == "latest":
        found = newest_intact(there)
        if found is None and there:
            faults = "".join(f"\n  {path.name}: {damage(path)}" for path in there)
            raise CheckpointError(
                f"training.resume_from_checkpoint: latest, and no checkpoint of {output_dir} is intact:{faults}\n"
                "restore one from a copy, or start again: resume_from_checkpoint=null, overwrite_output_dir=true"
            )
        return found
    names = ", ".join(p.name for p in there) or "none"
    for path in (output_dir / resume, Path(resume)):
        if (path / STATE_FILE).is_file() or (path / MANIFEST).is_file():
            if found_fault := damage(path):
                raise CheckpointError(
                    f"training.resume_from_checkpoint: {path} is damaged: {found_fault}. Restore it from a copy, or "
                    f"name another (this run has: {names}), or latest, which takes the newest intact one"
                )
            return path
    raise CheckpointError(
        f"training.resume_from_checkpoint: {resume} is no finished checkpoint (no {STATE_FILE} in it); "
        f"this run has: {names}. Give one of these, a path, or latest"
    )


def newest_intact(paths: Iterable[Path]) -> Path | None:
    """The newest intact one of some checkpoints, given oldest first; damaged ones are logged."""
    for path in reversed(list(paths)):
        if (found := damage(path)) is None:
            return path
        if (path, found) not in _logged:
            _logged.add((path, found))
            log.warning("%s is damaged and is not used: %s", path, found)
    return None


def damage(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None. Its files are read once, as long as they do not change.

    With `hashes` False only names and sizes are compared. A checkpoint without a manifest is of an older version: only
    its state file is read, and a warning is logged.
    """
    if not (checkpoint / MANIFEST).exists():
        try:
            if _read_state(checkpoint).get("manifest") is not None:
                return f"{MANIFEST} is missing"
        except CheckpointError as error:
            return str(error)
        if hashes and (checkpoint, "") not in _logged:
            _logged.add((checkpoint, ""))
            log.warning("%s has no hashes (it is of an older version): damage may go unnoticed", checkpoint)
        return None
    if not hashes:
        return manifest.fault(checkpoint, hashes=False)
    files = [(file, file.stat()) for file in sorted(checkpoint.rglob("*"))]
    state = [(str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in files]
    if _checked.get(checkpoint, (None, None))[0] != state:
        _checked[checkpoint] = state, manifest.fault(checkpoint)
    return _checked[checkpoint][1]


def set_aside(output_dir: Path, step: int) -> None:
    """Renames checkpoints after `step` to checkpoint-N.abandoned: a resumed run will write its own."""
    for newer in [p for p in checkpoints(output_dir) if _step(p) > step]:
        abandoned = newer.with_name(f"{newer.name}.abandoned")
        remove(abandoned)
        newer.rename(abandoned)
        log.info("%s is from before this run resumed at step %d: renamed to %s", newer.name, step, abandoned.name)


def remove_partial(output_dir: Path) -> None:
    """Removes what a killed run left incomplete in its folder, to which no other run may be writing."""
    for path in output_dir.glob(".*.replaced"):  # killed between two renames
        place = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if not place.exists():
            path.rename(place)
    for pattern in (f".*{PARTIAL}", ".*.replaced", ".*.removed"):
        for path in output_dir.glob(pattern):
            remove(path)


def load_training_state(checkpoint: Path) -> dict[str, Any]:
    """The training state of a checkpoint, on the CPU. Raises CheckpointError where it cannot be read."""
    return _read_state(checkpoint, mmap=False)


def identity_of(checkpoint: Path) -> dict[str, Any]:
    """What the run of a checkpoint was made from; empty for older versions."""
    content = manifest.read_manifest(checkpoint)
    return {} if isinstance(content, str) else content.get("identity", {})


def load_source_state(checkpoint: Path) -> dict[str, Any]:
    """The state of the run's source; empty for a source of existing pairs."""
    file = checkpoint / SOURCE_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def source_states(output_dir: Path) -> list[dict[str, Any]]:
    """The source's state in each checkpoint that has one, also while it is written; damaged files are ignored.

    Another thread may rename and remove checkpoints meanwhile. So the unfinished ones are read before the others are
    listed: one that is renamed in between is among these.
    """
    states = []
    for file in output_dir.glob(f".checkpoint-*{PARTIAL}/{SOURCE_FILE}"):
        with suppress(ValueError, FileNotFoundError):
            states.append(json.loads(file.read_text()))
    for checkpoint in checkpoints(output_dir):
        with suppress(ValueError, FileNotFoundError):
            states.append(load_source_state(checkpoint))
    return [state for state in states if state]


def _read_state(checkpoint: Path, mmap: bool = True) -> dict[str, Any]:
    """The state file; with `mmap` its tensors are not read. Torch has several errors for a file that is damaged."""
    file = checkpoint / STATE_FILE
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{STATE_FILE} cannot be read ({' '.join(str(error).split())[:200]})") from error


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, dict):
        return sum(map(tensor_bytes, values.values()))
    return sum(map(tensor_bytes, values)) if isinstance(values, list | tuple) else 0


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))
