"""Pickled weights read without running their code: the tensors of a file of torch.save, and what else is in it.

torch reads the file with `weights_only=True`. Each class or function that the file names is replaced by one without
behaviour: nothing is imported, and no code in the file runs. Of a whole pickled module, its parameters and persistent
buffers are what the module's own `state_dict` would give.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ModelError

SHOWN = 8  # names in a message


class Inert:
    """Stands for a class of a pickle: it takes any arguments and state, and does nothing with them."""

    def __init__(self, *arguments: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


@dataclass(frozen=True)
class Pickled:
    """Tensors by name, and the other entries of their file, each as `name (kind)`."""

    tensors: dict[str, Tensor]
    left_out: tuple[str, ...] = ()


def read_pickle(file: Path, key: str | None = None) -> Pickled:
    """The state dict in a file: the file itself, its entry `key`, the only entry that is one, or that of a module.

    Raises ModelError for a file that holds none or several of these, with the names and kinds of what it holds, for
    values in them that are no plain tensors, and for a file that torch refuses.
    """
    if not file.is_file():
        raise ModelError(f"there is no file {file}: check the path")
    try:
        zipped = zipfile.is_zipfile(file)  # else written before torch 1.6, and read if it names no class of others
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file)) if zipped else []
        stand_ins: Any = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint, or that is refused
        raise ModelError(f"{file} is not read ({torch_reason(error)}); download it again") from error
    entries = found if isinstance(found, dict) else {}
    if key is not None:
        if key not in entries:
            raise ModelError(f"{file} has no entry {key!r}; it holds {_listed(entries)}")
        chosen = [key]
    else:
        chosen = [] if _state(found) else [name for name in entries if _state(entries[name])]
        if len(chosen) > 1:
            raise ModelError(f"{file} holds several state dicts, {', '.join(chosen)}: choose one (--key {chosen[0]})")
    state = _state(entries[chosen[0]] if chosen else found)
    if not state:
        raise ModelError(f"{file} has neither a state dict (names and tensors) nor a module; it holds {_listed(found)}")
    if odd := [name for name, value in state.items() if value.is_sparse or value.is_quantized]:
        raise ModelError(f"{file} has sparse or quantised tensors ({odd[0]}, …), which safetensors cannot store")
    left_out = tuple(f"{name} ({_kind(value)})" for name, value in entries.items() if chosen and name != chosen[0])
    return Pickled(_apart(state), left_out)


def torch_reason(error: Exception) -> str:
    """Why torch does not read a file, without its advice to run the file's code."""
    cause = error.__context__ if isinstance(error.__context__, type(error)) else error
    return f"{type(error).__name__}: {' '.join(str(cause).split())[:200]}"


def _state(value: Any) -> dict[str, Tensor]:
    """The tensors of a state dict or a module by name; empty for anything else."""
    state = _module_tensors(value) if isinstance(value, Inert) else value
    whole = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    return state if whole else {}


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, none of which shares memory with another or is a part of more."""
    made, taken = {}, set()
    for name, value in state.items():
        storage = value.untyped_storage()
        own = value.is_contiguous() and storage.nbytes() == value.nbytes and storage.data_ptr() not in taken
        taken.add(storage.data_ptr())
        made[name] = value.detach() if own else value.detach().clone(memory_format=torch.contiguous_format)
    return made


def _module_tensors(module: Any, prefix: str = "") -> dict[str, Any]:
    """Parameters and persistent buffers by name, from what a pickled module has in its fields."""
    fields = vars(module) if isinstance(module, Inert) else {}
    transient = fields.get("_non_persistent_buffers_set", ())
    buffers = {name: value for name, value in (fields.get("_buffers") or {}).items() if name not in transient}
    own = {**(fields.get("_parameters") or {}), **buffers}
    tensors = {prefix + name: value for name, value in own.items() if value is not None}
    for name, child in (fields.get("_modules") or {}).items():
        tensors |= _module_tensors(child, f"{prefix}{name}.")
    return tensors


def _listed(found: Any) -> str:
    """What a file holds, with the entries that are no tensors first."""
    if not isinstance(found, dict):
        return _kind(found)
    entries = sorted(found.items(), key=lambda entry: isinstance(entry[1], Tensor))
    more = ", …" if len(entries) > SHOWN else ""
    return ", ".join(f"{name} ({_kind(value)})" for name, value in entries[:SHOWN]) + more or "nothing"


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, Tensor) else type(value).__name__
