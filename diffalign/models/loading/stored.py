"""The weight files of one component's folder: which set of them is read, and their tensors one at a time.

    STEM.safetensors, STEM-00001-of-00002.safetensors           the plain set, in one file or several
    STEM.fp16.safetensors, STEM.fp16-00001-of-00002.safetensors a variant

STEM is diffusion_pytorch_model for diffusers' models and model for transformers'.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from diffalign.io.weight_files import check_weights
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import UNet

UNET_STEM = "diffusion_pytorch_model"
# older shards have the variant last
_NAME = r"(?:\.(?P<variant>[^-]+?))?(?:-\d+-of-(?P<parts>\d+)(?:\.(?P<late>[^-]+?))?)?\.safetensors"
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")


def weight_sets(folder: Path, stem: str) -> dict[str | None, list[Path]]:
    """The weight files in a folder by variant, None being the plain ones. Raises ModelError where parts are missing."""
    found: dict[str | None, dict[Path, int]] = {}  # file -> of how many parts it is one; 0: all weights in one file
    for file in sorted(folder.glob("*.safetensors")):
        if (name := re.fullmatch(re.escape(stem) + _NAME, file.name)) is not None:
            found.setdefault(name["variant"] or name["late"], {})[file] = int(name["parts"] or 0)
    return {variant: _complete(folder, files) for variant, files in found.items()}


def _complete(folder: Path, files: dict[Path, int]) -> list[Path]:
    """The one file with all weights where there is one, else all parts. Raises ModelError where parts are missing."""
    parts = max(files.values())
    if single := [file for file, of in files.items() if not of]:
        return single
    if len(files) != parts:
        raise ModelError(
            f"{folder} contains {len(files)} of the {parts} parts of its weights ({min(files).name}, …): download or "
            "copy the missing ones"
        )
    return list(files)


def choose_weights(folder: Path, stem: str, variant: str | None) -> tuple[str | None, list[Path]]:
    """The set of files to read, after its variant: the named variant; without one the plain set, or the only other.

    Raises ModelError where there is none, or several and none was named.
    """
    sets = weight_sets(folder, stem)
    if variant is None and None not in sets and len(sets) == 1:
        (variant,) = sets
    if variant not in sets:
        raise ModelError(_none_there(folder, sets, variant))
    return variant, sets[variant]


def check_folder_weights(folder: Path, stem: str) -> None:
    """Raises ModelError unless a folder has one set of weights and the headers of its files are right."""
    for file in choose_weights(folder, stem, None)[1]:
        check_weights(file)


def _none_there(folder: Path, sets: dict[str | None, list[Path]], variant: str | None) -> str:
    if not folder.is_dir():
        return f"cannot load the weights in {folder}: the folder is missing; download or copy the model again"
    names = sorted(file.name for file in folder.iterdir())
    what = f"cannot load the weights in {folder} (variant: {'null' if variant is None else variant})"
    if sets:
        there = ", ".join(f"variant: {'null' if name is None else name}" for name in sorted(sets, key=str))
        return f"{what}: found {', '.join(names)}. Set model.variant to one that exists ({there})"
    if any(name.endswith(_PICKLED) for name in names):
        return (
            f"{what}: only pickled weights exist ({', '.join(names)}), and they are not opened because "
            "they can run code. Convert the model's folder once: `diffalign convert FOLDER --out NEW_FOLDER`, which "
            "reads tensors and runs nothing else in them"
        )
    return f"{what}: found {', '.join(names) or 'nothing'}; download or copy the model again"


def stored_unet(folder: Path, unet: UNet) -> Callable[[str], Tensor]:
    """The tensors of a UNet's folder, or of its file alone, by name, each read when it is asked for.

    Raises ModelError unless their names and shapes are those of `unet`.
    """
    own = unet.state_dict()
    stored: dict[str, Any] = {}  # name -> the open file that has it
    files = [folder] if folder.is_file() else choose_weights(folder, UNET_STEM, None)[1]
    unlike = []
    for file in files:
        shapes = check_weights(file).shapes
        opened = safe_open(file, framework="pt")
        for name, shape in shapes.items():
            if name in stored:
                raise ModelError(f"{folder} contains {name} twice, once in {file.name}; remove one set of files")
            stored[name] = opened
            if name in own and shape != tuple(own[name].shape):
                unlike.append(f"{name} is {list(shape)} in the file, {list(own[name].shape)} in the base")
    if different := sorted(stored.keys() ^ own.keys()):
        unlike.append(f"{len(different)} tensors exist on one side only, e.g. {different[0]}")
    if unlike:
        raise ModelError(
            f"the tuned UNet in {folder} does not fit this base: {unlike[0]}. Use the base it was tuned from"
        )
    return lambda name: stored[name].get_tensor(name)
