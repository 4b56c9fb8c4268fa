"""Files that are no safetensors, or damaged ones, are refused by name with the remedy before a library opens them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.contrib.ppd.weights import load_user_attention
from diffalign.data.table.users import open_users
from diffalign.errors import ModelError
from diffalign.export.kohya import export_kohya
from diffalign.io.weight_files import MAX_HEADER, check_weights, order_metadata
from diffalign.models.adapters.lora import load_lora
from diffalign.models.adapters.merge import merge_tuned
from diffalign.models.adapters.save_load import find_tuned, load_full
from diffalign.models.loading.base import load_base
from diffalign.rewards.clip import load_state

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167536\n"


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(begin: int, end: int, shape: object = (2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


WHOLE = file_of({"a": tensor(0, 8)}, b"\0" * 8)
# one name for two spans of bytes
ENTRY = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [%d, %d]}'
TWICE = file_of(f"{{{ENTRY % (0, 8)}, {ENTRY % (8, 16)}}}".encode(), b"\0" * 16)
# content of the file -> its name in the message, and what to do
BROKEN: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "is empty", "download or copy it again"),
    "git-lfs": (LFS, r"Git-LFS pointer \(\d+ bytes\) and not the weights \(3438167536 bytes\)", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html>Sign in</html>", "is a web page", "hf auth login"),
    "zip of torch.save": (b"PK\x03\x04" + b"\0" * 60, "is a pickle under another name", "diffalign convert"),
    "pickle": (b"\x80\x04\x95" + b"\0" * 60, "is a pickle under another name", "diffalign convert"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 60, "GGUF", "give the model's .safetensors"),
    "text": (b"not found", "no safetensors file", "download or copy it again"),
    "7 bytes": (b"\0" * 7, "no safetensors file", "download or copy it again"),
    "header of 10^18 bytes": (file_of({}, length=10**18), "10 bytes; .*header too large", "again"),
    "header beyond the limit": (file_of({}, length=MAX_HEADER + 1), "header too large", "again"),
    "header of 0 bytes": (file_of(b""), "invalid JSON in header: EOF", "again"),
    "cut within the header": (WHOLE[:20], "20 bytes; .*invalid header length", "again"),
    "cut within the tensors": (WHOLE[:-3], "file not fully covered", "again"),
    "longer than it says": (WHOLE + b"\0", "file not fully covered", "again"),
    "no JSON": (file_of(b"{]"), "invalid JSON in header", "again"),
    "not UTF-8": (file_of(b"\xff\xfe\xff"), "invalid UTF-8 in header", "again"),
    "deep nesting": (file_of(b"[" * 100_000), "no safetensors file", "again"),
    "a list": (file_of([]), "invalid type: sequence", "again"),
    "overlap": (file_of({"a": tensor(0, 8), "b": tensor(4, 12)}, b"\0" * 12), "invalid offset for tensor `b`", "again"),
    "gap": (file_of({"a": tensor(8, 16)}, b"\0" * 16), "invalid offset for tensor `a`", "again"),
    "a shape of 10^30": (file_of({"a": tensor(0, 0, [0, 10**30])}), "expected usize", "again"),
    "a negative shape": (file_of({"a": tensor(0, 8, [-1, -2])}, b"\0" * 8), "expected usize", "again"),
    "true as a shape": (file_of({"a": tensor(0, 4, [True])}, b"\0" * 4), "invalid type: boolean", "again"),
    "shape against offsets": (
        file_of({"a": tensor(0, 8, [3])}, b"\0" * 8),
        "invalid shape, data type, or offset",
        "again",
    ),
    "an unknown dtype": (file_of({"a": tensor(0, 8, [2], "F33")}, b"\0" * 8), "unknown variant `F33`", "again"),
    "a name twice": (TWICE, "invalid offset for tensor `a`", "again"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "expected a string", "again"),
}
BROKEN["tensors of null"] = (file_of({"a": None}), "invalid type: null", "again")


@pytest.mark.parametrize("kind", BROKEN)
def test_what_the_file_is_and_what_to_do(tmp_path: Path, kind: str) -> None:
    content, what, remedy = BROKEN[kind]
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=what) as error:
        check_weights(file)
    assert str(file) in str(error.value)
    assert remedy in str(error.value)


def test_whole_files_pass(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(2, 3), "a": torch.zeros((), dtype=torch.bfloat16), "none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = check_weights(tmp_path / "x.safetensors")
    assert header.shapes == {"a": (), "b": (2, 3), "none": (0, 4)}
    assert header.metadata == {"format": "pt"}


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"x\.safetensors does not exist: check the path"):
        check_weights(tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="is a folder"):
        check_weights(tmp_path)


@pytest.fixture(scope="module")
def base(tiny_sd: Path):
    return load_base(str(tiny_sd))


def unet_folder(base, file: Path) -> Path:
    """A tuned UNet's folder with the file's content as its weights."""
    folder = file.parent / "unet"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(file.read_bytes())
    return folder


READERS: dict[str, Callable] = {
    "tuned": lambda base, file: find_tuned(file),
    "LoRA": lambda base, file: load_lora(base.unet, file),
    "full UNet": lambda base, file: load_full(base.unet, unet_folder(base, file)),
    "user attention": lambda base, file: load_user_attention(base.unet, file),
    "single file": lambda base, file: load_base(str(file)),
    "merge": lambda base, file: merge_tuned(base, [(str(file), 1.0)], file.parent / "merged"),
    "export": lambda base, file: export_kohya(file, file.with_name("out.safetensors"), base=base.source),
    "users": lambda base, file: open_users(str(file)),
    "scorer": lambda base, file: load_state(file),
}


@pytest.mark.parametrize("kind", ["git-lfs", "header of 10^18 bytes", "cut within the tensors"])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_says_the_same(base, tmp_path: Path, reader: str, kind: str) -> None:
    content, what, remedy = BROKEN[kind]
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=what) as error:
        READERS[reader](base, file)
    assert str(tmp_path) in str(error.value)
    assert remedy in str(error.value)


def test_equal_weights_and_metadata_give_equal_files(tmp_path: Path) -> None:
    """safetensors itself writes the metadata in a random order: eight keys would be equal once in 40,320 times."""
    file = tmp_path / "w.safetensors"
    metadata = {f"key{i}": f'{{"é": "a\\n{i}"}}' for i in range(8)}
    written = set()
    for _ in range(3):
        save_file({"w": torch.arange(3.0)}, file, metadata)
        order_metadata(file)
        written.add(file.read_bytes())
    assert len(written) == 1
    assert dict(check_weights(file).metadata) == metadata
    assert torch.equal(load_file(file)["w"], torch.arange(3.0))
