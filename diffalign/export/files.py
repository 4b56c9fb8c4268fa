"""Safetensors files written one tensor at a time, and never half: made under another name, then renamed.

`safetensors.torch.save_file` wants every tensor at once, which for SDXL is a second model in memory. The format is
8 bytes with the header's length, the header (a JSON object: name -> dtype, shape, offsets), then the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from diffalign.export.names import ExportError
from diffalign.io.files import written_whole

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HASHES = {"sshs_model_hash": "", "modelspec.hash_sha256": "0x"}  # metadata keys, and what stands before the digits
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

    The keys of `HASHES` in `metadata` get the SHA-256 of the tensors' bytes as they lie in the file.
    Raises ExportError for values that are not finite in that dtype and for two tensors of one name, NoSpaceError where
    the disk is full; then, as after any other error, `out` is as it was.
    """
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ExportError(f"{len(twice)} names would be given twice, e.g. {twice[0]}")
    # the wider first: readers take a tensor's bytes where they lie, and must find them aligned
    placed = sorted(((e, e.dtype or dtype) for e in entries), key=lambda pair: -pair[1].itemsize)
    digest = hashlib.sha256()
    needed = sum(prod(entry.shape) * own.itemsize for entry, own in placed)
    with written_whole(out, needed) as partial, open(partial, "wb") as file:
        file.write(_header(placed, metadata, digest.hexdigest()))
        for entry, own in placed:
            content = _bytes(entry, own)
            digest.update(content)
            file.write(content)
        file.seek(0)
        file.write(_header(placed, metadata, digest.hexdigest()))  # as long as the first


def _header(placed: Sequence[tuple[TensorEntry, torch.dtype]], metadata: Mapping[str, str], digest: str) -> bytes:
    """The header with its length before it, padded so that the tensors start at a multiple of 8."""
    hashes = {name: f"{before}{digest}" for name, before in HASHES.items() if name in metadata}
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata, **hashes}}
    end = 0
    for entry, dtype in placed:
        start, end = end, end + prod(entry.shape) * dtype.itemsize
        header[entry.name] = {"dtype": _CODES[dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    content = json.dumps(header, ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


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
