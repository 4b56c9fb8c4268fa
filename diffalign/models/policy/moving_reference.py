"""A reference that follows the policy: after every so many updates it becomes (1 − α) · reference + α · policy.

    α < 1 after every update   an exponential moving average (Linear-DPO, arXiv 2605.21123: decay .995 is α = .005)
    α = 1 after every τ        a copy every τ updates (Rethinking DPO, arXiv 2505.18736: τ from 16 to 64)

    α = 1 − η(i) at update i   DiffusionNFT (arXiv 2509.16117): η(i) = min(rate · max(0, i − after), at_most)

The names of the first two settings are TRL's (TR-DPO, arXiv 2404.09656). With `max_distance` δ, a reference that would
be farther than δ from where it started is drawn back along the straight line to its start, with the distance

    sqrt( Σ |w − w_start|² / Σ |w_start|² )    over the trained weights

Under LoRA the reference is other weights of the adapter, exchanged while it predicts, so there is one UNet in memory;
the distance is then that of the adapter. Otherwise it is a second UNet in the dtype of the policy's weights, because an
average in bfloat16 would not move; with δ the start stays in CPU memory. Every operation is on one weight at a time.

Differs from Rethinking DPO: the paper's own measure of distance, and what it does at the bound, could not be read, so δ
here is ours, and the paper's values (.005 for SD1.5, .002 for SDXL) may mean something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.models.adapters.lora import lora_layers
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import UNet
from diffalign.models.policy.reference import FrozenCopy, OtherLora


@dataclass(frozen=True)
class Decay:
    """η, the share that the reference keeps of itself when it moves."""

    after: int  # optimiser updates; up to there η = 0
    rate: float  # growth for each update
    at_most: float

    def __call__(self, updates: int) -> float:
        """η after so many updates."""
        return min(self.rate * max(0, updates - self.after), self.at_most)


@dataclass(frozen=True)
class ReferenceSync:
    """When and how far a reference moves."""

    every: int  # optimiser updates
    mixup_alpha: float = 1.0  # α, the policy's share
    max_distance: float | None = None  # δ; None: no bound
    decay: Decay | None = None  # α = 1 − η; None: mixup_alpha

    def alpha(self, updates: int) -> float:
        """α at so many updates."""
        return self.mixup_alpha if self.decay is None else 1 - self.decay(updates)

    @property
    def description(self) -> str:
        """In a few words, for the plan of a run."""
        when = "update" if self.every == 1 else f"{self.every} updates"
        how = "a copy of the policy" if self.mixup_alpha == 1 else f"moves by {self.mixup_alpha:g} to the policy"
        if self.decay is not None:
            how = f"keeps a share of itself that grows by {self.decay.rate:g} an update to {self.decay.at_most:g}"
        bound = "" if self.max_distance is None else f", at most {self.max_distance:g} from its start"
        return f"{how} after every {when}{bound}"


class MovingReference:
    """The reference of a run whose policy starts at it; make it before the first update."""

    kind = "moving"

    def __init__(self, unet: UNet, sync: ReferenceSync) -> None:
        self.description = sync.description
        self._sync, self._updates = sync, 0
        trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        self._policy = list(trained.values())
        self._inner: OtherLora | FrozenCopy
        if lora_layers(unet):
            self._inner = OtherLora(unet)
            others = self._inner.weights
        else:
            self._inner = FrozenCopy(unet)
            others = {name: p.detach() for name, p in self._inner.module.named_parameters()}
        self._weights: list[Tensor] = [others[name] for name in trained]
        self._start = None if sync.max_distance is None else [w.to("cpu", copy=True) for w in self._weights]

    @property
    def module(self) -> UNet | None:
        """The second UNet, where there is one."""
        return self._inner.module if isinstance(self._inner, FrozenCopy) else None

    @contextmanager
    def active(self) -> Iterator[UNet]:
        """The module that predicts for the reference inside the block."""
        with self._inner.active() as module:
            yield module

    @torch.no_grad()
    def after_update(self) -> None:
        """Counts an update of the policy, and moves the reference where it is due."""
        self._updates += 1
        if self._updates % self._sync.every:
            return
        alpha = self._sync.alpha(self._updates)
        for weight, policy in zip(self._weights, self._policy, strict=True):
            if alpha == 1:
                weight.copy_(policy)
            else:
                weight.lerp_(policy.to(weight.dtype), alpha)
        if self._start is not None and self._sync.max_distance is not None:
            _draw_back(self._weights, self._start, self._sync.max_distance)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: the weights, and how many updates were counted."""
        return {"updates": self._updates, "weights": [weight.detach().cpu() for weight in self._weights]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores it. Raises ModelError for weights of another network."""
        if [w.shape for w in state["weights"]] != [w.shape for w in self._weights]:
            raise ModelError("the reference in this checkpoint is of another network; resume with the run's own config")
        self._updates = state["updates"]
        for weight, saved in zip(self._weights, state["weights"], strict=True):
            weight.copy_(saved)


def _draw_back(weights: Sequence[Tensor], start: Sequence[Tensor], most: float) -> None:
    """Weights at most so far from their start, relative to its size; nothing is read back from the device."""
    moved = size = torch.zeros((), dtype=torch.float64, device=weights[0].device)
    for weight, first in zip(weights, start, strict=True):
        first = first.to(weight.device)
        moved = moved + (weight.double() - first.double()).square().sum()
        size = size + first.double().square().sum()
    share = (most * (size / moved).sqrt()).clamp(max=1)  # 0/0 where nothing moved
    share = torch.where(moved > 0, share, torch.ones_like(share))
    for weight, first in zip(weights, start, strict=True):
        first = first.to(weight.device)
        drawn = first.double() + share * (weight.double() - first.double())
        weight.copy_(torch.where(share < 1, drawn, weight.double()))
