"""Sharded states in a checkpoint: written and read by torch.distributed.checkpoint, for any number of processes.

    checkpoint-N/training_state.pt    as ever, with a marker in the place of each sharded tensor
    checkpoint-N/sharded/             those tensors (moments of the optimiser, EMA); each process writes its part

A run reads them as it needs them: cut for as many processes as it has, or whole where it is not sharded. A sharded run
reads whole states just as well. The checkpoint's manifest lists the files with their hashes. DCP's index is a pickle;
only its own few classes are read from it.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.io.files import PARTIAL, remove, room_for
from diffalign.models.policy.sharding import is_shard, is_sharded, like, of_parts, parts
from diffalign.training.checkpoints.checkpoint import NO_ROOM, CheckpointError, tensor_bytes

if TYPE_CHECKING:
    from diffalign.training.trainable import Trainable

SHARDS = "sharded"
INDEX = ".metadata"  # of DCP, in that folder
MARKER = "sharded:"  # and the name of the tensor in the folder
_CLASSES = {  # of DCP's index
    "torch": {"Size", "device", "float32", "bfloat16", "strided", "contiguous_format"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"Path", "PosixPath"},
}


def take_out(state: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Nested dicts and lists with a marker for each DTensor, and these by name."""
    if isinstance(state, Tensor):
        return (f"{MARKER}{name}", {name: state}) if is_shard(state) else (state, {})
    if not isinstance(state, dict | list):
        return state, {}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    parts = {key: take_out(value, f"{name}.{key}" if name else str(key)) for key, value in items}
    shards = {key: value for _, found in parts.values() for key, value in found.items()}
    plain = {key: part for key, (part, _) in parts.items()}
    return (plain if isinstance(state, dict) else list(plain.values())), shards


def trained_state(run: Trainable) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The states of optimiser and EMA, and what of them is sharded; see `take_out`."""
    ema = None if run.ema is None else run.ema.state_dict()
    if ema is not None:
        ema = {**ema, "shadow_params": of_parts(ema["shadow_params"], run.parameters)}
    return take_out({"optimizer": run.optimizer.state_dict(), "ema": ema})


def save_shards(run: Trainable, step: int, shards: dict[str, Tensor]) -> Path | None:
    """Writes sharded tensors to a hidden folder of the run, which every process calls; None without any.

    Raises NoSpaceError.
    """
    if not shards:
        return None
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = run.output_dir / f".checkpoint-{step}.shards{PARTIAL}"
    if run.accelerator.is_main_process:
        remove(folder)
    run.accelerator.wait_for_everyone()
    needed = tensor_bytes(parts(shards.values()))
    with room_for(run.output_dir, needed, f"checkpoint-{step}", NO_ROOM):
        save(shards, storage_writer=FileSystemWriter(folder, sync_files=not _synced_later(run)))
        if run.accelerator.is_main_process:
            _forget_the_occasion(folder / INDEX)
    return folder


def _forget_the_occasion(index: Path) -> None:
    """Writes DCP's index without the folder's former name and a random id: a repeated run writes the same bytes."""
    metadata = _read_index(index)
    metadata.storage_meta = None
    with index.open("wb") as file:
        pickle.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())


def _read_index(index: Path) -> Any:
    with index.open("rb") as file:
        return _Unpickler(file).load()


def _synced_later(run: Trainable) -> bool:
    """Whether the main process flushes all files beside the next steps: it can do so for its own machine's."""
    one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == run.accelerator.num_processes
    return run.config.training.async_checkpoints and one_machine


def put_back(run: Trainable, folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's training state as this run needs it: its own shards, or whole tensors.

    Raises CheckpointError where the sharded part cannot be read.
    """
    names = list(_markers(state))
    found = _read(run, folder / SHARDS, names) if names else {}
    state = _filled(state, found)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    for place, values in state["optimizer"]["state"].items():
        own = parameters[place]
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == own.shape:
                values[key] = like(value, own)
    if state.get("ema") is not None:
        averages = state["ema"]["shadow_params"]
        state["ema"]["shadow_params"] = parts(like(x, own) for x, own in zip(averages, run.parameters, strict=True))
    return state


def _read(run: Trainable, folder: Path, names: list[str]) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.tensor import Shard, empty

    reader = _reader(folder)
    try:
        index = reader.read_metadata().state_dict_metadata
        targets: dict[str, Any] = {}
        for name in names:
            entry = index[name]
            assert isinstance(entry, TensorStorageMetadata)
            dtype = entry.properties.dtype
            if is_sharded(run.module):
                mesh = run.parameters[0].device_mesh  # type: ignore[attr-defined]
                targets[name] = empty(entry.size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
            else:
                targets[name] = torch.empty(entry.size, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(targets, storage_reader=reader, no_dist=True)  # each process reads what it needs
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder} cannot be read ({' '.join(str(error).split())[:200]})") from error
    return targets


def _reader(folder: Path) -> Any:
    """DCP's reader of files, whose index may name its own classes alone."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            metadata = _read_index(folder / INDEX)
            metadata.storage_meta = StorageMeta(load_id=self.load_id)
            return metadata

    return Reader(folder)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which no checkpoint of this program has")


def _markers(state: Any) -> Iterator[str]:
    if isinstance(state, str) and state.startswith(MARKER):
        yield state.removeprefix(MARKER)
    elif isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _markers(value)


def _filled(state: Any, found: dict[str, Tensor]) -> Any:
    fill: Callable[[Any], Any] = lambda value: _filled(value, found)  # noqa: E731
    if isinstance(state, str) and state.startswith(MARKER):
        return found[state.removeprefix(MARKER)]
    if isinstance(state, dict):
        return {key: fill(value) for key, value in state.items()}
    return [fill(value) for value in state] if isinstance(state, list) else state
