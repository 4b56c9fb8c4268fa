"""Safetensors files written one tensor at a time, and never half: made under another name, then renamed.

`safetensors.torch.save_file` wants every tensor at once, which for SDXL is a second model in memory. The format is
8 bytes with the header's length, the header (a JSON object: name -> dtype, shape, offsets), then the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from diffalign.export.names import ExportError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file, made when it is written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    dtype: torch.dtype | None = None  # None: the file's


def check_out(out: Path, overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """Raises ExportError for a file that cannot be written there, before any work is done."""
    if out.suffix != ".safetensors":
        raise ExportError(f"--out {out}: give a file that ends in .safetensors; nothing is pickled here")
    if out.is_dir():
        raise ExportError(f"--out {out} is a folder; give a file in it, e.g. {out / 'tuned.safetensors'}")
    target = out.resolve()
    if target.exists() and {path.resolve() for path in sources} & {target, *target.parents}:
        raise ExportError(f"--out {out} is one of the files that would be read; give another name")
    if out.exists() and not overwrite:
        raise ExportError(f"--out {out} exists; give another name, or --overwrite to replace it")


def write_entries(out: Path, entries: Sequence[TensorEntry], dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write the entries to `out`, in `dtype` unless they have their own, each let go before the next is made.

    Raises ExportError for values that are not finite in that dtype and for two tensors of one name; then, as after
    any other error, `out` is as it was.
    """
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ExportError(f"{len(twice)} names would be given twice, e.g. {twice[0]}")
    # the wider first: readers take a tensor's bytes where they lie, and must find them aligned
    placed = sorted(((e, e.dtype or dtype) for e in entries), key=lambda pair: -pair[1].itemsize)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "wb") as file:
            header = json.dumps(_header(placed, metadata), ensure_ascii=False).encode()
            header += b" " * (-len(header) % 8)  # tensors start at a multiple of 8, as the format's own writer has it
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for entry, own in placed:
                file.write(_bytes(entry, own))
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _header(placed: Sequence[tuple[TensorEntry, torch.dtype]], metadata: Mapping[str, str]) -> dict[str, object]:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for entry, dtype in placed:
        start, end = end, end + prod(entry.shape) * dtype.itemsize
        header[entry.name] = {"dtype": _CODES[dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    return header


def _bytes(entry: TensorEntry, dtype: torch.dtype) -> memoryview:
    made = entry.make()
    if tuple(made.shape) != entry.shape:
        raise ExportError(f"{entry.name} has shape {tuple(made.shape)}, {entry.shape} was expected")
    cast = made.to(dtype)
    if not cast.isfinite().all():
        name = next(name for name, known in DTYPES.items() if known == dtype)
        raise ExportError(
            f"{entry.name} has values that are not finite"
            + (f" in {name} (up to {made.abs().max():.3g}); give --dtype bf16" if made.isfinite().all() else "")
        )
    return cast.contiguous().reshape(-1).view(torch.uint8).numpy().data
