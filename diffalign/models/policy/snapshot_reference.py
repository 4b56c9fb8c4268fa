"""A reference that can be any former policy of the run: kept on disk, put into the network that answers for it.

    LoRA   pytorch_lora_weights.safetensors, as every LoRA file; the adapter's weights are exchanged within `active()`,
           so there is still one UNet in memory
    full   delta.safetensors: what has changed since the start, in bfloat16 (half of a copy; its rounding is at most
           1/256 of the change itself), on a second UNet; the starting weights stay in CPU memory

What has no file is the policy as it was when the reference was made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.io.files import file_faults, list_files, written_whole
from diffalign.io.weight_files import check_weights
from diffalign.models.adapters.lora import adapter_weights, lora_layers, save_lora
from diffalign.models.loading.family import Family, ModelError
from diffalign.models.loading.modules import UNet
from diffalign.models.policy.reference import FrozenCopy, HeldLora

DELTA_FILE = "delta.safetensors"
HASHES = "hashes.json"  # size and SHA-256 of each file


class Former(Protocol):
    """A reference whose weights can be exchanged for those of a former policy."""

    @property
    def kind(self) -> str:
        """ "former"."""

    @property
    def description(self) -> str:
        """What it is, in a few words for the plan of a run."""

    @contextmanager
    def active(self) -> Iterator[UNet]:
        """Within the block, the module that answers for the reference."""

    def save(self, folder: Path) -> None:
        """Writes the policy as it is now; a folder that is there is a whole one."""

    def load(self, folder: Path | None) -> None:
        """From now on answers as the policy that was saved there; None: as the one at the start. Raises ModelError."""


class FormerLora:
    """The policy's own network with another state of its adapter."""

    kind = "former"
    description = "former policies"

    def __init__(self, unet: UNet, family: Family) -> None:
        self._unet, self._family = unet, family
        self._start = {name: p.detach().clone() for name, p in unet.named_parameters() if ".lora_" in name}
        self._reference = HeldLora(unet, self._start)

    @contextmanager
    def active(self) -> Iterator[UNet]:
        """The held weights in place inside the block, the policy's own back however it ends. Nothing is copied."""
        with self._reference.active() as module:
            yield module

    def save(self, folder: Path) -> None:
        """The adapter as a LoRA file that every reader takes."""
        with _whole(folder) as partial:
            save_lora(self._unet, partial, self._family)

    def load(self, folder: Path | None) -> None:
        """Takes up a saved adapter. Raises ModelError when its file is not there."""
        if folder is None:
            self._reference.hold(self._start)
            return
        if not folder.is_dir():
            raise _gone(folder)
        _check(folder)
        self._reference.hold(adapter_weights(self._unet, folder))


class FormerCopy:
    """A second UNet, made before training starts."""

    kind = "former"
    description = "former policies"

    def __init__(self, unet: UNet, autocast_dtype: torch.dtype | None = None) -> None:
        self._unet = unet
        self._copy = FrozenCopy(unet, autocast_dtype)
        self.module = self._copy.module
        self._start = {name: p.detach().to("cpu", copy=True) for name, p in self._copy.module.named_parameters()}

    @contextmanager
    def active(self) -> Iterator[UNet]:
        """The second UNet."""
        with self._copy.active() as module:
            yield module

    def save(self, folder: Path) -> None:
        """What has changed since the start, in bfloat16."""
        delta = {
            name: (p.detach().cpu().float() - self._start[name].float()).to(torch.bfloat16)
            for name, p in self._unet.named_parameters()
        }
        with _whole(folder) as partial:
            save_file(delta, partial / DELTA_FILE)

    def load(self, folder: Path | None) -> None:
        """The starting weights plus what was saved. Raises ModelError when the file is not there or does not fit."""
        delta: dict[str, Tensor] = {}
        if folder is not None:
            if not (folder / DELTA_FILE).is_file():
                raise _gone(folder / DELTA_FILE)
            _check(folder)
            check_weights(folder / DELTA_FILE)
            delta = load_file(folder / DELTA_FILE)
            if delta.keys() != self._start.keys():
                raise ModelError(f"{folder / DELTA_FILE} belongs to another UNet; use the source folder of this run")
        with torch.no_grad():
            for name, p in self._copy.module.named_parameters():
                start = self._start[name]
                p.copy_(start if name not in delta else start.float() + delta[name].float())


def make_former(unet: UNet, family: Family, autocast_dtype: torch.dtype | None = None) -> Former:
    """The exchangeable reference of a run, from its unwrapped policy before training."""
    return FormerLora(unet, family) if lora_layers(unet) else FormerCopy(unet, autocast_dtype)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` when the block ends well, with hashes of its files."""
    with written_whole(folder, what="a snapshot") as partial:
        partial.mkdir()
        yield partial
        (partial / HASHES).write_text(json.dumps(list_files(partial)) + "\n")


def _check(folder: Path) -> None:
    """Raises ModelError for a former policy that is damaged; one of an older version has no hashes."""
    try:
        faults = file_faults(folder, json.loads((folder / HASHES).read_bytes()))
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError, AttributeError):
        faults = [f"{HASHES} is not readable"]
    if faults:
        raise ModelError(
            f"the snapshot {folder} is damaged: {'; '.join(faults)}. Restore it from a copy, or start again"
        )


def _gone(path: Path) -> ModelError:
    return ModelError(
        f"the snapshot {path} is missing, and this run needs it as its reference: restore it, or start the run again"
    )
