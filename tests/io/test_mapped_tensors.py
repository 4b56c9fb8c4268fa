"""Safetensors files by memory map: the library's values, and nothing that a read leaves behind."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.errors import ModelError
from diffalign.io.mapped_tensors import MappedTensors

KINDS = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """One of every type, at odd sizes; an empty one, and one without axes."""
    some = torch.arange(3 * 7 * 5).reshape(3, 7, 5) % 11 - 3
    tensors = {f"of {kind}": some.to(kind)[:, : number % 7 + 1].clone() for number, kind in enumerate(KINDS)}
    save_file({**tensors, "empty": torch.zeros(0, 4), "one": torch.tensor(5.0)}, tmp_path / "a", {"says": "ä"})
    return tmp_path / "a"


def test_values_and_header_are_the_library_s(file: Path) -> None:
    found, expected = MappedTensors(file), load_file(file)
    assert sorted(found.names) == sorted(expected)
    assert found.metadata == {"says": "ä"}
    for name, value in expected.items():
        assert found.shape(name) == value.shape
        read = found.read(name)
        assert read.dtype == value.dtype
        assert torch.equal(read, value)
    with safe_open(file, "pt") as opened:
        stored = opened.get_slice("of torch.float16")
        assert torch.equal(found.read("of torch.float16", slice(1, 2)), stored[1:2])
        assert torch.equal(found.read("of torch.float16", 2, slice(None), slice(1, 3)), stored[2, :, 1:3])


def test_a_read_leaves_nothing_and_takes_no_other_row_along(file: Path) -> None:
    found = MappedTensors(file)

    def read() -> int:
        for _ in range(1000):
            row = found.read("of torch.int64", 1)
        assert row.untyped_storage().nbytes() == row.numel() * row.itemsize
        row.zero_()
        gc.collect()
        return sys.getallocatedblocks()

    before = read()
    assert abs(read() - before) < 500  # the library: 1,000 integers
    assert found.read("of torch.int64", 1).any()


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_another_file_is_an_error_when_it_is_opened(file: Path, damage: str) -> None:
    content = {"cut": file.read_bytes()[:-8], "text": b"version https://git-lfs", "empty": b""}[damage]
    file.write_bytes(content)
    with pytest.raises(ModelError, match=str(file)):
        MappedTensors(file)
