"""Pickled weights as safetensors, for `diffalign convert`: one file, a UNet as a folder, or a whole model folder."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import ExistingFileError
from diffalign.io.files import written_whole
from diffalign.io.pickles import read_pickle
from diffalign.models.hub import pickled_file
from diffalign.models.loading.base import outline_base
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.stored import UNET_STEM

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_PREFIXES = ("", "module.", "unet.", "model.")  # of wrappers that saved a network with their own name for it
# stems of weight files; transformers' is another one for safetensors
_STEM = re.compile(r"(diffusion_pytorch_model|pytorch_model|pytorch_lora_weights|adapter_model)((?:[.-][^.]+)*)\.bin")


@dataclass(frozen=True)
class Converted:
    """What was written, and what of the source was not."""

    path: Path
    tensors: int
    left_out: tuple[str, ...]


def convert_file(source: str, out: Path, key: str | None = None) -> Converted:
    """The tensors of a pickle, which may be OWNER/NAME::FILE on the Hub, as `out`. Raises ModelError.

    key: the entry of the pickle that has the weights, where it has several.
    """
    if out.suffix != ".safetensors":
        raise ModelError(f"{out} does not end in .safetensors: name the file to write")
    found = read_pickle(pickled_file(source), key)
    _save(found.tensors, out)
    return Converted(out, len(found.tensors), found.left_out)


def convert_unet(source: str, out: Path, base: str, key: str | None = None) -> Converted:
    """A pickled UNet as `out`/unet with the config of the base's, so that --tuned takes it.

    Raises ModelError unless its tensors are those of the base's UNet, with or without the prefix of a wrapper.
    """
    found = read_pickle(pickled_file(source), key)
    unet = outline_base(base).unet
    wanted = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    for prefix in _PREFIXES:
        state = {name.removeprefix(prefix): value for name, value in found.tensors.items() if name.startswith(prefix)}
        if state.keys() == wanted.keys() and len(state) == len(found.tensors):
            break
    else:
        odd = sorted(found.tensors.keys() ^ wanted.keys())
        raise ModelError(
            f"{source} is not the UNet of {base}: {len(odd)} of its names are on one side only, e.g. {odd[0]}. Without "
            "--base, a whole checkpoint becomes one .safetensors file, which is a base of its own"
        )
    if unlike := [name for name, value in state.items() if tuple(value.shape) != wanted[name]]:
        name = unlike[0]
        raise ModelError(f"{source} is not the UNet of {base}: {name} is {list(state[name].shape)}, not {wanted[name]}")
    with written_whole(out / "unet") as partial:
        partial.mkdir(parents=True)
        save_config: Any = unet.save_config
        save_config(partial)
        save_file(state, partial / f"{UNET_STEM}.safetensors", metadata={"format": "pt"})
    return Converted(out / "unet", len(state), found.left_out)


def convert_folder(source: Path, out: Path) -> Converted:
    """A copy of a model's folder whose weights are safetensors: diffusers' and transformers' files, LoRAs and shards.

    Other pickles, and weights that exist as safetensors already, are left out. Raises ModelError for a folder without
    weights to convert.
    """
    files = sorted(file for file in source.rglob("*") if file.is_file() and ".git" not in file.parts)
    targets = {file: file.with_name(_renamed(file.name)) for file in files}
    if not any(target.suffix == ".safetensors" != file.suffix for file, target in targets.items()):
        raise ModelError(f"{source} has no weights to convert (diffusion_pytorch_model.bin, pytorch_model.bin, …)")
    left_out, tensors = [], 0
    with written_whole(out) as partial:
        for file, target in targets.items():
            place = partial / target.relative_to(source)
            inside = str(file.relative_to(source))
            if file.suffix in PICKLES and (target == file or target in targets):
                left_out.append(
                    f"{inside} ({'not weights by its name' if target == file else 'as safetensors already'})"
                )
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix in PICKLES:
                found = read_pickle(file)
                _save(found.tensors, place)
                tensors += len(found.tensors)
                left_out += [f"{inside}: {each}" for each in found.left_out]
            elif file.name.endswith(".bin.index.json"):
                index = json.loads(file.read_text(encoding="utf-8"))
                index["weight_map"] = {name: _renamed(shard) for name, shard in index["weight_map"].items()}
                place.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(file, place)
    return Converted(out, tensors, tuple(left_out))


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raises ExistingFileError for a file or folder that is there and may not be replaced."""
    if path.exists() and not overwrite:
        raise ExistingFileError(f"{path} exists; name another place, or give --overwrite to replace it")


def _renamed(name: str) -> str:
    """The name of a weight file as safetensors; other names stay."""
    if name.endswith(".bin.index.json"):
        return f"{_renamed(name.removesuffix('.index.json')).removesuffix('.safetensors')}.safetensors.index.json"
    found = _STEM.fullmatch(name)
    if found is None:
        return name
    return f"{'model' if found[1] == 'pytorch_model' else found[1]}{found[2]}.safetensors"


def _save(tensors: dict[str, Tensor], out: Path) -> None:
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    with written_whole(out, size) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
