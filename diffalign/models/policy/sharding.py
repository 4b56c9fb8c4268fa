"""Networks whose weights are cut into shards, one for each process: PyTorch's FSDP2 (`fully_shard`).

Every resnet and transformer block gathers its weights for its own forward and backward and gives them up again. The
gradient of each micro-batch is averaged over the processes and cut at once, so that no process has a whole one. With
an autocast dtype the weights of matmuls and convolutions are gathered in it and their gradients are averaged in
float32. Norms are gathered in float32: what autocast computes in float32 must not be rounded on its way. So a forward
gives the bits of the network that is not sharded.

A forward of a sharded network is a conversation of all processes. Where they may call it a different number of times
(images, held-out pairs), it is `gathered` first. For files, whole weights go through a `HostCopy` in main memory.
Left out: several machines with a copy of the weights each (HSDP), shards in main memory, shards of buffers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffalign.models.kernels.checkpointing import AUTOCAST_LAYERS
from diffalign.models.loading.modules import UNet

UNITS = ("BasicTransformerBlock", "Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")


def shard(network: nn.Module, mesh: Any, autocast_dtype: torch.dtype | None) -> None:
    """Cuts every parameter along its first axis over the mesh, in place, and moves the network to the mesh's device.

    Parameters become DTensors; `network.parameters()` must be read anew. A network on the CPU reaches the device block
    by block, so that it never has to fit there whole.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def own(policy: Any) -> dict[str, Any]:
        # Weights that stayed gathered after a forward without grad would not see the optimiser's next update.
        return {"mesh": mesh, "reshard_after_forward": True, "mp_policy": policy}

    reduce = None if autocast_dtype is None else torch.float32
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    cast_to = MixedPrecisionPolicy(param_dtype=autocast_dtype, reduce_dtype=reduce, cast_forward_inputs=False)
    precise = [m for m in network.modules() if m._parameters and not isinstance(m, AUTOCAST_LAYERS)]
    if precise:
        fully_shard(precise, **own(whole))
    for unit in reversed([m for m in network.modules() if type(m).__name__ in UNITS]):
        fully_shard(unit, **own(cast_to))
    fully_shard(network, **own(cast_to))


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` was applied to a network."""
    return hasattr(network, "reset_iter_state")  # of FSDP2's modules alone; no import of torch.distributed.fsdp


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def joined(tensor: Tensor) -> Tensor:
    """The whole tensor of a DTensor, which all processes must ask for; any other tensor as it is."""
    return cast("Tensor", cast("Any", tensor).full_tensor()) if is_shard(tensor) else tensor


def parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's part of each DTensor, in the same memory; other tensors as they are."""
    return [cast("Any", x).to_local() if is_shard(x) else x for x in tensors]


def of_parts(own: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """The DTensors that have these parts and are cut as `others` are; tensors as they are where those are whole."""
    if not any(map(is_shard, others)):
        return list(own)
    from torch.distributed.tensor import DTensor

    places = [cast("DTensor", x) for x in others]
    return [
        DTensor.from_local(x, y.device_mesh, y.placements, run_check=False, shape=y.shape, stride=y.stride())
        for x, y in zip(own, places, strict=True)
    ]


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor cut as `other` is, on its device; as it is where one is no whole tensor. No process is asked."""
    if not is_shard(other) or is_shard(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


@contextmanager
def gathered(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block each process has the whole weights, in the dtype of a forward, and calls whichever it likes.

    All processes enter and leave together, outside of forward and backward. Networks that are not sharded stay as
    they are.
    """
    sharded = [cast("Any", network) for network in networks if is_sharded(network)]
    for network in sharded:
        network._get_fsdp_state()._lazy_init()  # which FSDP2 does at the first forward, and that may be in one process
        network.set_reshard_after_forward(False)
        for module in network.modules():
            if is_sharded(module):
                module.unshard()
    try:
        yield
    finally:
        for network in sharded:
            network.reset_iter_state()  # cuts again, and forgets forwards that only some processes made
            network.set_reshard_after_forward(True)


class HostCopy:
    """A UNet with the same trained weights in main memory and frozen ones without memory, for files of any layout.

    Made before `shard`, which cannot be copied.
    """

    def __init__(self, unet: UNet) -> None:
        frozen = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
            for p in unet.parameters()
        }
        self.unet: UNet = copy.deepcopy(unet, cast("dict[int, Any]", frozen))
        self._places = [
            (module._parameters, key, p.dtype)
            for module in self.unet.modules()
            for key, p in module._parameters.items()
            if p is not None and p.requires_grad
        ]

    def fill(self, trained: Sequence[Tensor], wanted: bool = True) -> None:
        """Joins the shards of the trained weights; all processes must call it, and those that `wanted` get them."""
        for (parameters, key, _), own in zip(self._places, trained, strict=True):
            whole = joined(own.detach())
            if wanted:
                parameters[key] = nn.Parameter(whole.to("cpu", copy=True))

    def make_room(self) -> None:
        """Memory for weights that a file is read into."""
        self._put("cpu")

    @torch.no_grad()
    def give(self, trained: Sequence[Tensor]) -> None:
        """Puts the weights here into the trained ones, each process its shard."""
        for (parameters, key, _), own in zip(self._places, trained, strict=True):
            own.copy_(like(cast("Tensor", parameters[key]).detach(), own))

    def empty(self) -> None:
        """Gives the memory back."""
        self._put("meta")

    def _put(self, device: str) -> None:
        for parameters, key, dtype in self._places:
            parameters[key] = nn.Parameter(
                torch.empty(cast("Tensor", parameters[key]).shape, dtype=dtype, device=device)
            )
