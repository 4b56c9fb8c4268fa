"""The two tuning methods of the core: LoRA, and all weights of the UNet."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from diffalign.models.adapters.dora import check_linear
from diffalign.models.adapters.layouts import LORA, UNET
from diffalign.models.adapters.lora import (
    ADAPTER,
    DEFAULT_TARGETS,
    adapter_weights,
    add_lora,
    check_targets,
    fuse_lora,
    load_lora,
    lora_parameters,
    start_magnitudes,
)
from diffalign.models.adapters.lora_file import is_dora
from diffalign.models.adapters.merge import merge_into
from diffalign.models.adapters.methods import Start, TuningMethod
from diffalign.models.adapters.save_load import check_tuned, find_tuned
from diffalign.models.kernels.checkpointing import store_for_autocast
from diffalign.models.kernels.quantized import quantize
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import UNet
from diffalign.models.policy.reference import FrozenCopy, LoraOff, OtherLora, Reference

log = logging.getLogger(__name__)
PATH = {"path": True}  # of a field: a path, in which a leading ~ is the home folder


@dataclass(frozen=True)
class LoRA(TuningMethod):
    """Low-rank adapters on the UNet's attention; the reference is the policy with its adapter switched off."""

    layout = LORA
    may_follow = True

    rank: int = field(default=16, metadata={"ge": 1})
    alpha: float | None = field(default=None, metadata={"gt": 0})  # None: equal to rank
    target_modules: tuple[str, ...] = DEFAULT_TARGETS
    resume_lora: str | None = field(default=None, metadata=PATH)  # LoRA weights to start from
    reference: str | None = field(default=None, metadata=PATH)  # LoRA weights of the reference; the policy starts there
    use_dora: bool = False  # the lengths of the weights' rows are trained too (DoRA, arXiv 2402.09353)
    quantize_base: Literal["int8", "nf4"] | None = None  # the frozen transformer blocks are stored in so few bits

    @property
    def lora_alpha(self) -> float:
        """alpha, or the rank if alpha is not set."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def starts_at_reference(self) -> bool:
        """Not where it goes on from weights that were tuned before."""
        return self.resume_lora is None

    def check(self) -> None:
        """Raises ModelError for a full UNet as the reference, and for a DoRA on codes."""
        if self.use_dora and self.quantize_base is not None:
            raise ModelError(
                "tuning.quantize_base: a DoRA reads the lengths of the base's rows at each step, and codes would be "
                "restored for that; set tuning.use_dora: false, or leave quantize_base out"
            )
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
            if (found := is_dora(find_tuned(path).path)) != self.use_dora:
                kind, wanted = "DoRA" if found else "plain LoRA", str(found).lower()
                raise ModelError(
                    f"{path} is a {kind}, and tuning.use_dora is {str(self.use_dora).lower()}; "
                    f"set tuning.use_dora: {wanted}, or give another file"
                )
        if not given:
            check_targets(unet, self.target_modules, self.rank)
            if self.use_dora:
                check_linear(unet, self.target_modules)

    def prepare(self, unet: UNet, start: Start) -> None:
        """Adds the adapter: a new one, or that of a file with the file's rank and alpha."""
        if (file := self.resume_lora or self.reference) is None:
            add_lora(unet, self.rank, self.lora_alpha, self.target_modules, seed=start.seed, use_dora=self.use_dora)
        else:
            load_lora(unet, find_tuned(file).path)
            found = unet.peft_config[ADAPTER]
            if (found.r, found.lora_alpha) != (self.rank, self.lora_alpha):
                log.warning(
                    "%s has rank %d and alpha %g, which replace tuning.rank and tuning.alpha",
                    file,
                    found.r,
                    found.lora_alpha,
                )
        if self.quantize_base is not None:
            quantize(unet, self.quantize_base)
        fuse_lora(unet)

    def after_placement(self, unet: UNet) -> None:
        """A new DoRA starts with the lengths of the weights as they are computed with, which may be rounded."""
        if self.use_dora and self.resume_lora is None and self.reference is None:
            start_magnitudes(unet)

    def undecayed(self, unet: UNet) -> list[nn.Parameter]:
        """A DoRA's lengths of rows, which decay would draw to 0 and not to the base's."""
        return [p for p in lora_parameters(unet) if p.ndim == 1]

    def make_reference(self, unet: UNet, autocast_dtype: torch.dtype | None) -> Reference:
        """The same network without its adapter, or with the weights of `reference` in it."""
        if self.reference is None:
            return LoraOff(unet)
        return OtherLora(unet, adapter_weights(unet, find_tuned(self.reference).path))

    def describe(self, unet: UNet) -> str:
        """Rank and alpha in force, also where they came with `resume_lora`."""
        adapter = unet.peft_config[ADAPTER]
        base = "" if self.quantize_base is None else f" on a base in {self.quantize_base}"
        return f"{'DoRA' if self.use_dora else self.method} rank {adapter.r} alpha {adapter.lora_alpha:g}{base}"


@dataclass(frozen=True)
class FullFineTuning(TuningMethod):
    """All weights of the UNet; the reference is a frozen copy."""

    layout = UNET
    trains_base = True
    may_follow = True

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
