"""What the policy is compared with. The kinds of the core:

    lora_off   the policy's own network with its LoRA layers switched off: no second UNet in memory
    other_lora the policy's own network with other LoRA weights in its adapter, such as those of a soup
    copy       a frozen copy, made before training starts
    former     a snapshot of an earlier policy, which a source chooses (`snapshot_reference.py`)
    moving     an average or copy of the policy that follows it during the run (`moving_reference.py`)

A tuning method makes its own reference (`TuningMethod.make_reference`), and may have a kind of its own.
With equal weights reference and policy give bitwise the same output: same kernels, same dtypes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor

from diffalign.models.adapters.lora import lora_layers
from diffalign.models.kernels.checkpointing import store_for_autocast
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import UNet
from diffalign.models.policy.sharding import is_shard, like


class Reference(Protocol):
    """A frozen network, available inside `active()`."""

    @property
    def kind(self) -> str:
        """Which of them this is."""

    @property
    def description(self) -> str:
        """What it is, in a few words for the plan of a run."""

    @contextmanager
    def active(self) -> Iterator[UNet]:
        """Within the block, the module that answers for the reference."""


class LoraOff:
    """The policy's unwrapped UNet without its LoRA update.

    peft's `disable_adapters()` walks all modules (43 ms on SDXL); here the layers are known and one attribute of each
    is set. It is the attribute peft's own layers read; their `enable_adapters` would also flip requires_grad, which
    must stay as the optimiser and DDP found it. Runs outside the DDP wrapper, so it never touches gradient buckets.
    """

    kind = "lora_off"
    description = "the policy with LoRA off"

    def __init__(self, unet: UNet) -> None:
        """Raises ModelError when `unet` has no LoRA layers."""
        layers = lora_layers(unet)
        if not layers:
            raise ModelError(
                "reference lora_off: this UNet has no LoRA layers to switch off, so the reference would be the policy "
                "itself. Add LoRA, or use reference copy"
            )
        self._unet = unet
        # The layers' attribute dictionaries: nn.Module.__setattr__ costs 20 times as much for each of 560 layers.
        self._switches = [layer.__dict__ for layer in layers]

    @contextmanager
    def active(self) -> Iterator[UNet]:
        """LoRA off inside the block, and back on however it ends."""
        try:
            for switch in self._switches:
                switch["_disable_adapters"] = True
            yield self._unet
        finally:
            for switch in self._switches:
                switch["_disable_adapters"] = False


class OtherLora:
    """The policy's own network with other weights in its adapter: those at the start, or those given to `use`."""

    kind = "other_lora"
    description = "the policy with other LoRA weights"

    def __init__(self, unet: UNet, weights: Mapping[str, Tensor] | None = None) -> None:
        """`weights` by parameter name, as `lora.adapter_weights` gives them; None: the adapter as it is now."""
        self._unet = unet
        # The dictionaries that hold the parameters: sharding puts others there, and changes them at each forward.
        self._places = {
            f"{prefix}.{key}": (module._parameters, key)
            for prefix, module in unet.named_modules()
            if ".lora_" in f"{prefix}."
            for key, parameter in module._parameters.items()
            if parameter is not None
        }
        own = {name: p for name, p in unet.named_parameters() if ".lora_" in name}
        if not own:
            raise ModelError("reference other_lora: this UNet has no LoRA layers for other weights; use reference copy")
        self.use({name: p.detach().clone() for name, p in own.items()} if weights is None else weights)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The other weights by parameter name, which may be changed in place."""
        return self._other

    def use(self, weights: Mapping[str, Tensor]) -> None:
        """From now on predicts with these weights, moved to the device and dtype of the adapter's own."""
        owns = {name: cast("Tensor", parameters[key]) for name, (parameters, key) in self._places.items()}
        self._other = {name: weights[name].to(own.device, own.dtype) for name, own in owns.items()}

    @contextmanager
    def active(self) -> Iterator[UNet]:
        """The other weights in place inside the block, the policy's own back however it ends. Nothing is copied."""
        own: dict[str, Tensor] = {}
        try:
            for name, (parameters, key) in self._places.items():
                own[name] = _put(cast("Tensor", parameters[key]), self._other[name])
            yield self._unet
        finally:
            for name, value in own.items():
                parameters, key = self._places[name]
                _put(cast("Tensor", parameters[key]), value)


def _put(parameter: Tensor, value: Tensor) -> Tensor:
    """Gives a parameter another value, and returns the one it had. A shard is copied, as FSDP2 has its address."""
    if is_shard(parameter):
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(like(value, parameter))
        return before
    before, parameter.data = parameter.data, value
    return before


class FrozenCopy:
    """A copy of the network as it is now; make it before the first optimiser step."""

    kind = "copy"
    description = "frozen copy"

    def __init__(self, unet: UNet, autocast_dtype: torch.dtype | None = None) -> None:
        """With `autocast_dtype` the copy stores its matmul and conv weights in it: half the memory, the same bits."""
        self.module = copy.deepcopy(unet).requires_grad_(False).eval()
        for parameter in self.module.parameters():
            parameter.grad = None
        if autocast_dtype is not None:
            store_for_autocast(self.module, autocast_dtype)
        # The copy is never trained: it is called without grad. But torch's matmul checks whether a weight
        # requires grad to choose between kernels that round differently, so the flags must be the policy's.
        for own, trained in zip(self.module.parameters(), unet.parameters(), strict=True):
            own.requires_grad_(trained.requires_grad)

    @contextmanager
    def active(self) -> Iterator[UNet]:
        """The copy."""
        yield self.module
