"""Checkpoints: weights in the format everybody loads, and beside them what only resuming needs.

    output_dir/checkpoint-N/unet/ or pytorch_lora_weights.safetensors    usable by `diffalign generate` as it is
    output_dir/checkpoint-N/config.yaml                                  the settings, resolved
    output_dir/checkpoint-N/training_state.pt                            optimiser, lr schedule, scaler, EMA, step
    output_dir/checkpoint-N/source.json                                  where a source that makes its pairs stands
    output_dir/checkpoint-N/manifest.json                                sizes and hashes of all of these

The order of the data and every draw follow from (seed, step), so neither needs saving. A checkpoint is written to a
hidden folder, flushed to the disk and renamed, so a killed run leaves no half of one. Before anything of one is loaded
its files are compared with its manifest. The state file is read with `weights_only=True`.
Left out: sharded (FSDP, DeepSpeed) states.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.io import manifest
from diffalign.io.files import PARTIAL, list_files, remove, sync, written_whole
from diffalign.io.manifest import MANIFEST

log = logging.getLogger(__name__)

STATE_FILE = "training_state.pt"
SOURCE_FILE = "source.json"
NO_ROOM = "the checkpoints there are whole. Free some, or name an output_dir on another disk, and resume"
_named: set[tuple[Path, str]] = set()  # damage that the log has named
_looked: dict[Path, tuple[object, str | None]] = {}  # the state of a checkpoint's files, and what was found of them


class CheckpointError(DiffalignError):
    """A checkpoint that is not there, is damaged or does not fit the run."""


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, damaged ones included."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if (p / STATE_FILE).is_file() or (p / MANIFEST).is_file()), key=_step)


def save_checkpoint(
    output_dir: Path,
    step: int,
    save_weights: Callable[[Path], None],
    state: dict[str, Any],
    total_limit: int | None = None,
    source: dict[str, Any] | None = None,
    *,
    identity: dict[str, Any] | None = None,
    weights_bytes: int = 0,
) -> Path:
    """Writes checkpoint-`step`, with the source's state if it has any; then removes the oldest beyond `total_limit`.

    identity: what the run is made from, to be compared on resuming. weights_bytes: size of what `save_weights` writes.
    Raises NoSpaceError, which leaves the earlier checkpoints as they are.
    """
    final = output_dir / f"checkpoint-{step}"
    state = {**state, "step": step, "manifest": manifest.FORMAT}
    needed = weights_bytes + tensor_bytes(state)
    with written_whole(final, needed, final.name, NO_ROOM) as partial:
        partial.mkdir()
        save_weights(partial)
        torch.save(state, partial / STATE_FILE)
        if source:
            (partial / SOURCE_FILE).write_text(json.dumps(source) + "\n")
        sync(partial)
        content = {"step": step, "identity": identity or {}, "files": list_files(partial)}
        manifest.write_manifest(partial, content)
    if total_limit is not None:
        _remove_beyond(output_dir, total_limit, final)
    return final


def _remove_beyond(output_dir: Path, limit: int, newest: Path) -> None:
    """Removes what is older than `limit` whole checkpoints, of which `newest`, just written, is one.

    Damaged ones do not count, so a whole one is never removed in favour of them.
    """
    whole = 1
    for path in [p for p in reversed(checkpoints(output_dir)) if p != newest]:
        if whole < limit:
            whole += damage(path, hashes=False) is None
            continue
        condemned = path.with_name(f".{path.name}.removed")  # a kill while removing leaves no half of it
        path.rename(condemned)
        remove(condemned)


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """The folder to resume from: "latest" is the newest whole one of the run (None where there is none yet), or a path.

    Raises CheckpointError when a named folder is no checkpoint or is damaged, and when all that are there are damaged.
    """
    there = checkpoints(output_dir)
    if resume == "latest":
        found = newest_whole(there)
        if found is None and there:
            faults = "".join(f"\n  {path.name}: {damage(path)}" for path in there)
            raise CheckpointError(
                f"training.resume_from_checkpoint: latest, and no checkpoint of {output_dir} is whole:{faults}\n"
                "put one back from a copy, or start again: resume_from_checkpoint=null, overwrite_output_dir=true"
            )
        return found
    names = ", ".join(p.name for p in there) or "none"
    for path in (output_dir / resume, Path(resume)):
        if (path / STATE_FILE).is_file() or (path / MANIFEST).is_file():
            if found_fault := damage(path):
                raise CheckpointError(
                    f"training.resume_from_checkpoint: {path} is damaged: {found_fault}. Put it back from a copy, or "
                    f"name another (this run has: {names}), or latest, which takes the newest whole one"
                )
            return path
    raise CheckpointError(
        f"training.resume_from_checkpoint: {resume} is no finished checkpoint (no {STATE_FILE} in it); "
        f"this run has: {names}. Give one of these, a path, or latest"
    )


def newest_whole(paths: Iterable[Path]) -> Path | None:
    """The newest of some checkpoints, given oldest first, that is whole; the log names the damaged ones it passes."""
    for path in reversed(list(paths)):
        if (found := damage(path)) is None:
            return path
        if (path, found) not in _named:
            _named.add((path, found))
            log.warning("%s is damaged and is passed over: %s", path, found)
    return None


def damage(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None. Its files are read whole, once for as long as they stay the same.

    With `hashes` False only names and sizes are looked at. One without a manifest is from before there were any, and
    only its state file is looked at; a warning says so.
    """
    if not (checkpoint / MANIFEST).exists():
        try:
            if _read_state(checkpoint).get("manifest") is not None:
                return f"{MANIFEST} is missing"
        except CheckpointError as error:
            return str(error)
        if hashes and (checkpoint, "") not in _named:
            _named.add((checkpoint, ""))
            log.warning("%s carries no hashes (it is of an older version): damage may not show", checkpoint)
        return None
    if not hashes:
        return manifest.fault(checkpoint, hashes=False)
    files = [(file, file.stat()) for file in sorted(checkpoint.rglob("*"))]
    state = [(str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in files]
    if _looked.get(checkpoint, (None, None))[0] != state:
        _looked[checkpoint] = state, manifest.fault(checkpoint)
    return _looked[checkpoint][1]


def set_aside(output_dir: Path, step: int) -> None:
    """Renames checkpoints after `step` to checkpoint-N.abandoned: a resumed run will write its own."""
    for newer in [p for p in checkpoints(output_dir) if _step(p) > step]:
        abandoned = newer.with_name(f"{newer.name}.abandoned")
        remove(abandoned)
        newer.rename(abandoned)
        log.info("%s is of the run before this one resumed at step %d: kept as %s", newer.name, step, abandoned.name)


def sweep(output_dir: Path) -> None:
    """Removes what a killed run left half written in its folder, which no other run may be writing to."""
    for path in output_dir.glob(".*.replaced"):  # killed between two renames
        place = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if not place.exists():
            path.rename(place)
    for pattern in (f".*{PARTIAL}", ".*.replaced", ".*.removed"):
        for path in output_dir.glob(pattern):
            remove(path)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The training state of a checkpoint, on the CPU. Raises CheckpointError where it cannot be read."""
    return _read_state(checkpoint, mmap=False)


def identity_of(checkpoint: Path) -> dict[str, Any]:
    """What the run of a checkpoint was made from; empty where that was not noted."""
    content = manifest.read_manifest(checkpoint)
    return {} if isinstance(content, str) else content.get("identity", {})


def load_source_state(checkpoint: Path) -> dict[str, Any]:
    """Where the run's source stood; empty for pairs that were there before the run."""
    file = checkpoint / SOURCE_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def source_states(output_dir: Path) -> list[dict[str, Any]]:
    """The source's state in each finished checkpoint that has one; a file that is damaged counts for none."""
    states = []
    for checkpoint in checkpoints(output_dir):
        with suppress(ValueError):
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
