"""A reference that can be any snapshot of the policy: stored on disk, loaded into the network that predicts for it.

    LoRA   pytorch_lora_weights.safetensors, an ordinary LoRA file; the adapter's weights are exchanged within
           `active()`, so there is one UNet in memory
    full   delta.safetensors: the change since the start, in bfloat16 (half the size of a copy; rounding is at most
           1/256 of the change), on a second UNet; the weights of the start stay in CPU memory

The policy at the start, when the reference is made, has no file.
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
from diffalign.models.adapters.lora import ADAPTER, adapter_state, adapter_weights, lora_layers, write_lora
from diffalign.models.loading.family import Family, ModelError
from diffalign.models.loading.modules import UNet
from diffalign.models.policy.reference import FrozenCopy, OtherLora
from diffalign.models.policy.sharding import joined, like

DELTA_FILE = "delta.safetensors"
HASHES = "hashes.json"  # size and SHA-256 of each file


class Former(Protocol):
    """A reference whose weights can be exchanged for those of a snapshot of the policy."""

    @property
    def kind(self) -> str:
        """ "former"."""

    @property
    def description(self) -> str:
        """A short description for the plan of a run."""

    @contextmanager
    def active(self) -> Iterator[UNet]:
        """The module that predicts for the reference inside the block."""

    def save(self, folder: Path, write: bool = True) -> None:
        """Writes a snapshot of the policy; the folder appears only when it is complete.

        Every process calls it, and one has `write`: the others may have shards of the weights.
        """

    def load(self, folder: Path | None) -> None:
        """Loads a snapshot; None means the policy at the start. Raises ModelError for a missing or damaged one."""


class FormerLora:
    """The policy's own network with another state of its adapter."""

    kind = "former"
    description = "snapshots of the policy"

    def __init__(self, unet: UNet, family: Family) -> None:
        self._unet, self._family = unet, family
        self._start = {name: p.detach().clone() for name, p in unet.named_parameters() if ".lora_" in name}
        self._reference = OtherLora(unet, self._start)

    @contextmanager
    def active(self) -> Iterator[UNet]:
        """Inside the block the adapter has the snapshot's weights, after it the policy's. Nothing is copied."""
        with self._reference.active() as module:
            yield module

    def save(self, folder: Path, write: bool = True) -> None:
        """Writes the adapter as an ordinary LoRA file."""
        state = adapter_state(self._unet)
        if write:
            with _whole(folder) as partial:
                write_lora(self._unet.peft_config[ADAPTER], state, partial, self._family)

    def load(self, folder: Path | None) -> None:
        """Loads a saved adapter. Raises ModelError if its folder is missing or damaged."""
        if folder is None:
            self._reference.use(self._start)
            return
        if not folder.is_dir():
            raise _gone(folder)
        _check(folder)
        self._reference.use(adapter_weights(self._unet, folder))


class FormerCopy:
    """A second UNet, made before training starts."""

    kind = "former"
    description = "snapshots of the policy"

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

    def save(self, folder: Path, write: bool = True) -> None:
        """Writes the change since the start, in bfloat16."""
        delta = {}
        for name, p in self._unet.named_parameters():
            now = joined(p.detach())
            if write:
                delta[name] = (now.cpu().float() - self._start[name].float()).to(torch.bfloat16)
        if write:
            with _whole(folder) as partial:
                save_file(delta, partial / DELTA_FILE)

    def load(self, folder: Path | None) -> None:
        """The weights of the start plus a saved change. Raises ModelError if the file is missing or does not fit."""
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
                p.copy_(like(start if name not in delta else start.float() + delta[name].float(), p))


def make_former(unet: UNet, family: Family, autocast_dtype: torch.dtype | None = None) -> Former:
    """The exchangeable reference of a run, from its unwrapped policy before training."""
    return FormerLora(unet, family) if lora_layers(unet) else FormerCopy(unet, autocast_dtype)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into; it replaces `folder`, with hashes of its files, when the block ends without error."""
    with written_whole(folder, what="a snapshot") as partial:
        partial.mkdir()
        yield partial
        (partial / HASHES).write_text(json.dumps(list_files(partial)) + "\n")


def _check(folder: Path) -> None:
    """Raises ModelError for a damaged snapshot; snapshots of older versions have no hashes."""
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
