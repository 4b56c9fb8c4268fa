"""The Triton kernels compared with torch's own and with torch.compile, at SDXL's shapes: time, and memory saved.

    python -m benchmarks.kernels --device cuda --dtype bf16 --out runs/kernels    # minutes; kernels.json, kernels.md
    python -m benchmarks.kernels --count --out runs/kernels                       # anywhere: bytes, on `meta`

Contenders take turns in one process. A turn runs over enough sets of random inputs to exceed any cache; a time is for
one set, launches included. GB/s count the bytes that every implementation must move (forward: read x, write the
result; backward: read x and its gradient, write the gradient by x), and stand beside a large copy measured in the same
run. A kernel that must read x twice, as a norm of a tensor larger than a cache does, cannot reach the rate of the
copy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import autocast_unet, table
from benchmarks.timing import copy_rate, take_turns
from diffalign.experimental.fused_geglu import geglu, geglu_eager
from diffalign.experimental.fused_norm import NHWC, group_norm_silu, group_norm_silu_eager
from diffalign.experimental.fusing import fuse_kernels
from diffalign.models.kernels.checkpointing import Checkpointing, set_checkpointing
from diffalign.training.inspect.activation_memory import SavedForBackward
from diffalign.training.inspect.meta_forward import unet_inputs
from diffalign.training.run import environment
from tests.gpu_models import SDXL_UNET

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BEYOND_CACHES = 256e6  # bytes; an H100 has 50 MB of L2
# Of SDXL at 1024 px: channels and side of latents at its norms with SiLU; inner width and side at its GEGLUs.
NORMS = ((320, 128), (640, 128), (960, 128), (640, 64), (1280, 64), (1920, 64), (1280, 32), (2560, 32))
GEGLUS = ((2560, 64), (5120, 32))
GROUPS = 32


@dataclass(frozen=True)
class Case:
    """A function's forms at one shape, its inputs, and the tensors' worth of bytes that each way must move."""

    name: str
    forms: dict[str, Callable[..., Tensor]]
    inputs: Callable[[], tuple[Tensor, Tensor, tuple[Any, ...]]]  # x, slope, what else the forms take
    forward_bytes: int
    backward_bytes: int


def cases(device: torch.device, dtype: torch.dtype, images: int, resolution: int) -> Iterator[Case]:
    """Every shape; sides are of latents at 1024 px and go with the resolution."""
    size = dtype.itemsize
    norms = {"torch": group_norm_silu_eager, "compiled": _compiled(group_norm_silu_eager), "kernels": group_norm_silu}
    for channels, side in NORMS:
        shape = (images, channels, side * resolution // 1024, side * resolution // 1024)

        def norm_inputs(shape: tuple[int, ...] = shape) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
            x, slope = (torch.randn(shape, device=device, dtype=dtype).to(memory_format=NHWC) for _ in range(2))
            weight, bias = (torch.randn(shape[1], device=device, requires_grad=True) for _ in range(2))
            return x.requires_grad_(), slope, (GROUPS, weight, bias)

        bytes_ = size * images * channels * shape[2] * shape[3]
        yield Case(f"GroupNorm, SiLU {channels} x {shape[2]}²", norms, norm_inputs, 2 * bytes_, 3 * bytes_)
    gates = {"torch": geglu_eager, "compiled": _compiled(geglu_eager), "kernels": geglu}
    for inner, side in GEGLUS:
        rows = (side * resolution // 1024) ** 2

        def gate_inputs(rows: int = rows, inner: int = inner) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
            x = torch.randn(images, rows, 2 * inner, device=device, dtype=dtype, requires_grad=True)
            return x, torch.randn(images, rows, inner, device=device, dtype=dtype), ()

        bytes_ = size * images * rows * inner
        yield Case(f"GEGLU {rows} x {inner}", gates, gate_inputs, 3 * bytes_, 5 * bytes_)


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)


def measure(case: Case, device: torch.device, dtype: torch.dtype, steps: int, rounds: int) -> list[dict[str, Any]]:
    """One line for each form, forward and backward. CPU has no compiled form here."""
    forms = {name: form for name, form in case.forms.items() if device.type == "cuda" or name != "compiled"}
    sets = int(BEYOND_CACHES // case.forward_bytes) + 1 if device.type == "cuda" else 1
    inputs = [case.inputs() for _ in range(sets)]

    def called(form: Callable[..., Tensor]) -> list[Tensor]:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return [form(x, *rest) for x, _, rest in inputs]

    def back(form: Callable[..., Tensor]) -> Callable[[], None]:
        outs = called(form)
        wanted = [(x, *(v for v in rest if isinstance(v, Tensor))) for x, _, rest in inputs]

        def step() -> None:
            for out, by, (_, slope, _) in zip(outs, wanted, inputs, strict=True):
                torch.autograd.grad(out, by, slope, retain_graph=True)

        return step

    lines = []
    for way, moved, made in (
        ("forward", case.forward_bytes, lambda form: lambda: (called(form), None)[1]),
        ("backward", case.backward_bytes, back),
    ):
        turns = {name: made(form) for name, form in forms.items()}
        timed = take_turns(turns, warmup=3, steps=steps, rounds=rounds, device=device)
        for name, found in timed.items():
            ms = found.summary()["median_ms"] / sets
            lines.append({"case": case.name, "way": way, "form": name, "ms": ms, "gb_per_s": moved / ms / 1e6})
    return lines


def kept(unet: nn.Module, side: int) -> int:
    """Bytes that a UNet keeps for the backward, of one image with latents of `side` x `side`."""
    inputs = unet_inputs(unet, 1, side)
    inputs["sample"] = inputs["sample"].to(torch.bfloat16).contiguous(memory_format=NHWC)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].to(torch.bfloat16)
    with SavedForBackward() as found:
        out = unet(**inputs)[0]
    del out
    return found.bytes


def count(resolution: int) -> list[dict[str, Any]]:
    """Kept bytes with torch's layers and with the kernels, for each tuning and checkpointing."""
    modes: tuple[Checkpointing, ...] = ("none", "selective", "full")
    lines: list[dict[str, Any]] = []
    for method in ("full", "lora"):
        unet = autocast_unet(SDXL_UNET, 16 if method == "lora" else None).to(memory_format=NHWC)
        found: dict[tuple[str, str], int] = {}
        for form in ("torch", "kernels"):
            if form == "kernels":
                fuse_kernels(unet, "meta")
            for mode in modes:
                set_checkpointing(unet, mode)
                found[form, mode] = kept(unet, resolution // 8)
        for mode in modes:
            lines.append({"tuning": method, "checkpointing": mode, **{f: found[f, mode] for f in ("torch", "kernels")}})
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this script."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--count", action="store_true", help="count kept bytes instead of measuring")
    p.add_argument("--device", default="cuda")
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--images", type=int, default=4, help="two pairs")
    p.add_argument("--resolution", type=int, default=1024)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--rounds", type=int, default=5)
    a = p.parse_args(arguments)
    result: dict[str, Any] = {"resolution": a.resolution}
    if a.count:
        name, lines = "kept", count(a.resolution)
        cells = [[x["tuning"], x["checkpointing"], *(f"{x[k] / 1e9:.2f}" for k in ("torch", "kernels"))] for x in lines]
        text = table(["tuning", "checkpointing", "torch, GB", "kernels, GB"], cells)
    else:
        name, device, dtype = "kernels", torch.device(a.device), DTYPES[a.dtype]
        copied = copy_rate(device) / 1e9
        result |= {"dtype": a.dtype, "images": a.images, "copy_gb_per_s": copied}
        lines = [
            line
            for case in cases(device, dtype, a.images, a.resolution)
            for line in measure(case, device, dtype, a.steps, a.rounds)
        ]
        cells = [
            [x["case"], x["way"], x["form"], f"{x['ms']:.4f}", f"{x['gb_per_s']:.0f}", f"{x['gb_per_s'] / copied:.0%}"]
            for x in lines
        ]
        text = f"{a.dtype}, {a.images} images; a copy: {copied:.0f} GB/s\n\n"
        text += table(["", "way", "form", "ms", "GB/s", "of the copy"], cells)
    a.out.mkdir(parents=True, exist_ok=True)
    record = {**result, "lines": lines, "environment": environment()}
    (a.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    (a.out / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
