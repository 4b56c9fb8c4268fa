"""Safetensors files: their headers are checked before a library opens them, and may contain the file's hash.

A safetensors file is 8 bytes with the length of its header, the header (a JSON object: name -> dtype, shape, offsets)
and the tensors' bytes. Users often have another file under that name: a Git-LFS pointer, a web page, a pickle, an
incomplete download. Libraries report these with tracebacks of their own, which name neither the file nor a remedy.
safetensors reads only the header here, so `check_weights` takes the same time for every size.

A file that we write can be stamped: its SHA-256 is in its own header, so there is no second file to lose.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from diffalign.errors import ModelError
from diffalign.io.files import hash_file

MAX_HEADER = 100_000_000  # bytes; the format's own limit
EMPTY_STAMP = "0" * 64
_STAMP = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_PICKLED = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # pickle's protocols; torch.save's zip
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_AGAIN = "download or copy it again"
CONVERT = (
    "convert it once: `diffalign convert FILE --out NEW.safetensors`, which reads its tensors and runs nothing of it"
)


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    shapes: Mapping[str, tuple[int, ...]]  # of every tensor
    metadata: Mapping[str, str]


def check_weights(path: str | Path) -> Header:
    """The header of a safetensors file that can be opened. Raises ModelError saying what the file is instead."""
    file = Path(path)
    if not file.is_file():
        is_folder = f"{file} is a folder, and one .safetensors file is needed: name the file in it"
        raise ModelError(is_folder if file.is_dir() else f"{file} does not exist: check the path")
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            return Header(shapes, opened.metadata() or {})
    except SafetensorError as error:
        raise ModelError(f"{file} {_what_it_is(file, str(error))}") from error


def read_header(file: Path) -> bytes:
    """The JSON header of a safetensors file. Raises ValueError where there is none."""
    with file.open("rb") as opened:
        length, size = int.from_bytes(opened.read(8), "little"), file.stat().st_size
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"its header would be {length} bytes long, and the file has {size}")
        return opened.read(length)


def order_metadata(file: Path) -> None:
    """Sorts the metadata in a safetensors file's header, which the library writes in a random order.

    Without it the files of two equal runs have different hashes. The header keeps its length.
    """
    old = read_header(file)
    header = json.loads(old)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    new = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(len(old))
    assert len(new) == len(old), f"{file}: another JSON than safetensors writes"
    with file.open("r+b") as opened:
        opened.seek(8)
        opened.write(new)


def stamp(file: Path) -> None:
    """Writes a safetensors file's hash into its header, where its metadata has `sha256: EMPTY_STAMP`.

    The hash is that of the file with EMPTY_STAMP in its place. Equal tensors and metadata give equal files.
    """
    order_metadata(file)
    place = read_header(file).find(f'"sha256":"{EMPTY_STAMP}"'.encode())
    assert place >= 0, f"{file} was saved without an empty stamp"
    digest = hash_file(file)
    with file.open("r+b") as opened:
        opened.seek(8 + place + len('"sha256":"'))
        opened.write(digest.encode())


def has_stamp(file: Path) -> bool:
    """Whether a safetensors file carries its hash; False also where it has no readable header."""
    try:
        return _STAMP.search(read_header(file)) is not None
    except (OSError, ValueError):
        return False


def stamp_fault(file: Path, *, required: bool = True) -> str | None:
    """What is wrong with a safetensors file, by the hash in its header; None where nothing is.

    required: whether a file without a hash is damaged. If not, the header and the size of such a file are checked.
    """
    try:
        found = _STAMP.search(read_header(file))
    except FileNotFoundError:
        return "it is missing"
    except ValueError as error:
        return f"it has no readable header: {error}"
    if found is None:
        return "it carries no hash" if required else _header_fault(file)
    first = 8 + found.start(1)
    with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(first) + EMPTY_STAMP.encode())
        opened.seek(first + len(EMPTY_STAMP))
        same = hashlib.file_digest(opened, lambda: digest).hexdigest() == found[1].decode()
    return None if same else "it has another content than was written (its SHA-256 differs)"


def _header_fault(file: Path) -> str | None:
    try:
        check_weights(file)
    except ModelError as error:
        return f"its header does not fit it: {error}"
    return None


def check_folder(folder: Path) -> None:
    """Checks every .safetensors file of a folder. Raises ModelError for the first that cannot be opened."""
    for file in sorted(folder.glob("*.safetensors")):
        check_weights(file)


def refuse_pickle(path: str | Path) -> None:
    """Raises ModelError for a file whose name says that it is pickled."""
    if str(path).endswith(_PICKLES):
        raise ModelError(
            f"{path} is a pickled checkpoint, which can run code when it is opened, so diffalign does not open it; "
            f"{CONVERT}"
        )


def _what_it_is(file: Path, error: str) -> str:
    """What a file that safetensors refuses with `error` is, with the remedy."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(1024)
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
    return f"is no safetensors file, or a damaged one ({size} bytes; {error}): {_AGAIN}"
