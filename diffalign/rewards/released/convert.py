"""Pickled weights to safetensors, once: `python -m diffalign.rewards.released.convert FILE.pth NEW.safetensors`.

torch reads the file with `weights_only=True`. Where it holds a whole pickled module, whose classes lie in the authors'
package, each class is replaced by one without behaviour: nothing of that package is imported, and no code in the file
runs. Its parameters and persistent buffers are what the module's own `state_dict` would give.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.base import ScorerError
from diffalign.rewards.clip import torch_reason


class Inert:
    """Stands for a class of a pickle: it takes any arguments and state, and does nothing with them."""

    def __init__(self, *arguments: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def pickled_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, of one under the key `state_dict`, or of a pickled module, by their names.

    Raises ScorerError for a file that holds none of these, or that would have to run code.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
        stand_ins: Any = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint, or that is refused
        raise ScorerError(f"{file} is not read ({torch_reason(error)}); download it again") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else _module_tensors(found)
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ScorerError(f"{file} has neither a state dict (names and tensors) nor a module; download it again")
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


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


def main(arguments: list[str] | None = None) -> None:
    """Writes NEW.safetensors and says what is in it."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description="convert pickled weights to safetensors without running their code")
    parser.add_argument("file", type=Path, help="a .pt, .pth or .bin file of torch.save")
    parser.add_argument("new", type=Path, help="the .safetensors file to write")
    given = parser.parse_args(arguments)
    if given.new.suffix != ".safetensors" or given.new.exists():
        parser.error(f"{given.new} exists already, or does not end in .safetensors: name a new .safetensors file")
    if not given.file.is_file():
        parser.error(f"there is no file {given.file}")
    try:
        tensors = pickled_tensors(given.file)
    except ScorerError as error:
        parser.error(str(error))
    save_file(tensors, given.new)
    print(f"{given.new}: {len(tensors)} tensors, {given.new.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
