"""The two tuning methods of the core: LoRA, and all weights of the UNet."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from diffalign.models.adapters.layouts import LORA, UNET
from diffalign.models.adapters.lora import (
    ADAPTER,
    DEFAULT_TARGETS,
    adapter_weights,
    add_lora,
    check_targets,
    fuse_lora,
    load_lora,
)
from diffalign.models.adapters.merge import merge_into
from diffalign.models.adapters.methods import Start, TuningMethod
from diffalign.models.adapters.save_load import check_tuned, find_tuned
from diffalign.models.kernels.checkpointing import store_for_autocast
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import UNet
from diffalign.models.policy.reference import FrozenCopy, LoraOff, OtherLora, Reference

log = logging.getLogger(__name__)
PATH = {"path": True}  # of a field: a path, in which a leading ~ is the home folder


@dataclass(frozen=True)
class LoRA(TuningMethod):
    """Low-rank adapters on the UNet's attention; the reference is the policy with its adapter switched off."""

    layout = LORA

    rank: int = field(default=16, metadata={"ge": 1})
    alpha: float | None = field(default=None, metadata={"gt": 0})  # None: equal to rank
    target_modules: tuple[str, ...] = DEFAULT_TARGETS
    resume_lora: str | None = field(default=None, metadata=PATH)  # LoRA weights to start from
    reference: str | None = field(default=None, metadata=PATH)  # LoRA weights of the reference; the policy starts there

    @property
    def lora_alpha(self) -> float:
        """alpha, or the rank if alpha is not set."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def starts_at_reference(self) -> bool:
        """Not where it goes on from weights that were tuned before."""
        return self.resume_lora is None

    def check(self) -> None:
        """Raises ModelError for a full UNet as the reference."""
        if self.reference is not None and find_tuned(self.reference).kind == UNET.kind:
            raise ModelError(
                f"tuning.reference: {self.reference} is a full UNet, and a LoRA on top of it would not be one of the "
                "base's; give a LoRA file, use tuning.method: full, or make that UNet part of the base model"
            )

    def check_base(self, unet: UNet) -> None:
        """Raises ModelError for LoRA files, targets or a rank that the UNet cannot take."""
        given = [path for path in (self.resume_lora, self.reference) if path is not None]
        for path in given:
            check_tuned(unet, path)
        if not given:
            check_targets(unet, self.target_modules, self.rank)

    def prepare(self, unet: UNet, start: Start) -> None:
        """Adds the adapter: a new one, or that of a file with the file's rank and alpha."""
        if (file := self.resume_lora or self.reference) is None:
            add_lora(unet, self.rank, self.lora_alpha, self.target_modules, seed=start.seed)
        else:
            load_lora(unet, file)
            found = unet.peft_config[ADAPTER]
            if (found.r, found.lora_alpha) != (self.rank, self.lora_alpha):
                log.warning(
                    "%s has rank %d and alpha %g, which replace tuning.rank and tuning.alpha",
                    file,
                    found.r,
                    found.lora_alpha,
                )
        fuse_lora(unet)

    def make_reference(self, unet: UNet, autocast_dtype: torch.dtype | None) -> Reference:
        """The same network without its adapter, or with the weights of `reference` in it."""
        return LoraOff(unet) if self.reference is None else OtherLora(unet, adapter_weights(unet, self.reference))

    def describe(self, unet: UNet) -> str:
        """Rank and alpha in force, also where they came with `resume_lora`."""
        adapter = unet.peft_config[ADAPTER]
        return f"{self.method} rank {adapter.r} alpha {adapter.lora_alpha:g}"


@dataclass(frozen=True)
class FullFineTuning(TuningMethod):
    """All weights of the UNet; the reference is a frozen copy."""

    layout = UNET
    trains_base = True

    reference: str | None = field(default=None, metadata=PATH)  # tuned weights; the policy starts there

    def check(self) -> None:
        """Raises ModelError for a reference that is missing, damaged or ambiguous."""
        if self.reference is not None:
            find_tuned(self.reference)

    def check_base(self, unet: UNet) -> None:
        """Raises ModelError for a reference that does not fit the UNet."""
        if self.reference is not None:
            check_tuned(unet, self.reference)

    def prepare(self, unet: UNet, start: Start) -> None:
        """Merges the reference into the base and makes every weight trainable."""
        if self.reference is not None:
            merge_into(unet, [(self.reference, 1.0)])
        if start.weights_dtype is not None:
            store_for_autocast(unet, start.weights_dtype)  # before they require grad: these become the trained weights
        unet.requires_grad_(True)

    def make_reference(self, unet: UNet, autocast_dtype: torch.dtype | None) -> Reference:
        """A copy of the network as it starts."""
        return FrozenCopy(unet, autocast_dtype)
