"""Own Triton kernels for what a UNet computes between its convolutions and matmuls: GroupNorm with SiLU, and GEGLU.

diffusers' layers get another class whose forward calls them (`fused_layers.py`); names of modules and weights, LoRA
layers, state dicts and checkpoints stay as they are. The kernels read channels-last activations, so the UNet should be
laid out so; a layer whose input is not converts it first.

torch.compile fuses the same layers by itself: a run has one or the other.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fuse_kernels(unet: nn.Module, device: torch.device | str) -> int:
    """Gives the UNet's plain resnet blocks, its last norm and its GEGLU layers fused forwards; returns their number.

    In place. Where the kernels cannot run on `device` nothing is changed, and the log says why.
    """
    reason = _missing(torch.device(device).type)
    if reason is not None:
        log.warning("model.fused_kernels: %s; the layers stay torch's own", reason)
        return 0
    from diffalign.models.fused_layers import fuse

    found = fuse(unet)
    log.info("fused kernels: %s", ", ".join(f"{number} {name}" for name, number in found.items()))
    return sum(found.values())


def kernels_by(device: torch.device | str) -> str | None:
    """Who makes the kernels that run on `device`, with the version; None where they cannot run."""
    if _missing(torch.device(device).type) is not None:
        return None
    return f"triton {importlib.metadata.version('triton')}"


def unavailable(x: Tensor) -> str | None:
    """Why the kernels cannot take x; None when they can."""
    if x.dtype not in _DTYPES:
        return f"{x.dtype} is not one of float32, bfloat16, float16"
    return _missing(x.device.type)


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution or matmul after x computes: autocast's, or x's own."""
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def _missing(kind: str) -> str | None:
    """`meta` launches nothing; Triton's interpreter (TRITON_INTERPRET=1) runs kernels on the CPU, for tests."""
    if kind == "meta":
        return None
    if not _has_triton():
        return "triton is not installed"
    if kind == "cuda" or (kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"kernels need CUDA, and this is {kind}"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
