"""Own Triton kernels in a UNet, for what it computes between its convolutions and matmuls: GroupNorm with SiLU, GEGLU.

diffusers' layers get another class whose forward calls them (`fused_layers.py`); names of modules and weights, LoRA
layers, state dicts and checkpoints stay as they are. The kernels read channels-last activations, so the UNet should be
laid out so; a layer whose input is not converts it first.

torch.compile fuses the same layers by itself: a run has one or the other.
"""

from __future__ import annotations

import logging

import torch

from diffalign.experimental.kernels import missing
from diffalign.models.loading.modules import UNet

log = logging.getLogger(__name__)


def fuse_kernels(unet: UNet, device: torch.device | str) -> int:
    """Gives the UNet's plain resnet blocks, its last norm and its GEGLU layers fused forwards; returns their number.

    In place. Where the kernels cannot run on `device` nothing is changed, and the log says why.
    """
    reason = missing(torch.device(device).type)
    if reason is not None:
        log.warning("model.fused_kernels: %s; the layers stay torch's own", reason)
        return 0
    from diffalign.experimental.fused_layers import fuse

    found = fuse(unet)
    log.info("fused kernels: %s", ", ".join(f"{number} {name}" for name, number in found.items()))
    return sum(found.values())
