"""Whether our Triton kernels can run where a tensor is, and in which dtype they answer."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_by(device: torch.device | str) -> str | None:
    """Who makes the kernels that run on `device`, with the version; None where they cannot run."""
    if missing(torch.device(device).type) is not None:
        return None
    return f"triton {importlib.metadata.version('triton')}"


def unavailable(x: Tensor) -> str | None:
    """Why the kernels cannot take x; None when they can."""
    if x.dtype not in _DTYPES:
        return f"{x.dtype} is not one of float32, bfloat16, float16"
    return missing(x.device.type)


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution or matmul after x computes: autocast's, or x's own."""
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def missing(kind: str) -> str | None:
    """Why no kernel runs on this kind of device; None where they do.

    `meta` launches nothing; Triton's interpreter (TRITON_INTERPRET=1) runs kernels on the CPU, for tests.
    """
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
