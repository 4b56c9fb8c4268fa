"""Weight files as users bring them, examined before a library opens them.

A safetensors file is 8 bytes with the length of its header, the header (a JSON object: name -> dtype, shape, offsets)
and the tensors' bytes. What looks like one and is none is usual: a Git-LFS pointer, a web page, a pickle under another
name, a download that stopped. Libraries answer these with tracebacks of their own, or try to take the memory that a
damaged header asks for. Only the header is read here, so the check costs the same for every size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.errors import ModelError

MAX_HEADER = 100_000_000  # bytes; the format's own limit
_LARGEST = 2**63 - 1  # of a dimension
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
_BITS |= {"F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32}
_BITS |= {"F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}
_PICKLED = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # pickle's protocols; torch.save's zip
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_AGAIN = "download or copy it again"
CONVERT = "convert it once, if you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)"


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    shapes: Mapping[str, tuple[int, ...]]  # of every tensor
    metadata: Mapping[str, str]


def check_weights(path: str | Path) -> Header:
    """The header of a safetensors file that can be opened. Raises ModelError saying what the file is instead."""
    file = Path(path)
    if file.is_dir():
        raise ModelError(f"{file} is a folder, and one .safetensors file is needed: name the file in it")
    if not file.is_file():
        raise ModelError(f"{file} does not exist: check the path")
    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(1024)
        length = int.from_bytes(start[:8], "little")
        text = b""
        if len(start) >= 8 and 0 < length <= min(MAX_HEADER, size - 8):
            opened.seek(8)
            text = opened.read(length)
    if not text:
        why = f"its header would be {length} bytes long, and the file has {size}"
        raise ModelError(f"{file} {_what_it_is(file, start, size) or _damaged(why)}")
    try:
        shapes, metadata = _parse(text, size - 8 - length)
    except (ValueError, RecursionError) as error:
        why = str(error) or type(error).__name__
        raise ModelError(f"{file} {_what_it_is(file, start, size) or _damaged(why)}") from error
    return Header(shapes, metadata)


def check_folder(folder: Path) -> None:
    """Examines every .safetensors file of a folder. Raises ModelError for the first that cannot be opened."""
    for file in sorted(folder.glob("*.safetensors")):
        check_weights(file)


def refuse_pickle(path: str | Path) -> None:
    """Raises ModelError for a file whose name says that it is pickled."""
    if str(path).endswith(_PICKLES):
        raise ModelError(
            f"{path} is a pickled checkpoint, which can run code when it is opened, and is never unpickled here; "
            f"{CONVERT}"
        )


def _what_it_is(file: Path, start: bytes, size: int) -> str | None:
    """The known things that are no safetensors file, each with its remedy."""
    if not size:
        return f"is empty (0 bytes): {_AGAIN}"
    if start.startswith(b"version https://git-lfs"):
        full = next((line[5:].decode("ascii", "replace") for line in start.splitlines() if line[:5] == b"size "), "?")
        return (
            f"is a Git-LFS pointer ({size} bytes) and not the weights ({full} bytes): run `git lfs install` and then "
            "`git lfs pull` in its repository, or get the model with `hf download`"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            f"is a web page ({size} bytes) and not the weights, as after a download that needed a login: {_AGAIN}, "
            "e.g. with `hf download`, and `hf auth login` for a gated model"
        )
    if start.startswith(_PICKLED):
        return f"is a pickle under another name, which can run code when it is opened: {CONVERT}"
    if start.startswith(b"GGUF"):
        return "is a GGUF file, whose weights are quantised: give the model's .safetensors weights"
    return None


def _damaged(why: str) -> str:
    return f"is no safetensors file, or a damaged one ({why}): {_AGAIN}"


def _parse(text: bytes, data: int) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and metadata of a header; `data` bytes follow it. Raises ValueError where it cannot be right."""
    header = json.loads(text, object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {}) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not all strings")
    spans = [(*_span(name, entry), name) for name, entry in header.items()]
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            raise ValueError(f"the bytes of {_short(name)} begin at {begin}, and {place} was due: overlap or gap")
        place = end
    if place != data:
        hint = "cut short" if place > data else "something was added"
        raise ValueError(f"its tensors take {place} bytes and {data} follow the header: {hint}")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}, metadata


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end. Raises ValueError unless shape, dtype and offsets agree."""
    known = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
    if not known or entry["dtype"] not in _BITS or not _counts(entry["shape"]) or not _counts(entry["data_offsets"]):
        raise ValueError(f"the entry of {_short(name)} is not one: {_short(entry)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    bits = math.prod(shape) * _BITS[entry["dtype"]]
    if len(offsets) != 2 or bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"the entry of {_short(name)} does not add up: {_short(entry)}")
    return offsets[0], offsets[1]


def _counts(values: Any) -> bool:
    """Whether this is a list of sizes that a tensor can have."""
    if not isinstance(values, list) or len(values) > 64:
        return False
    return all(type(value) is int and 0 <= value <= _LARGEST for value in values)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header gives a name twice")
    return found


def _short(value: Any) -> str:
    return f"{value!r:.120}"
