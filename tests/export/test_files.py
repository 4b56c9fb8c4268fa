"""Files written tensor by tensor: safetensors reads them, and an existing file stays until the new one is whole."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign.export.files import DTYPES, TensorEntry, check_out, write_entries
from diffalign.export.names import ExportError


def entry(name: str, value: torch.Tensor) -> TensorEntry:
    return TensorEntry(name, tuple(value.shape), lambda: value)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_safetensors_reads_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = {
        "matrix": torch.randn(3, 5, generator=generator).T,  # not contiguous
        "half": torch.randn(7, generator=generator).half(),
        "double": torch.randn(2, 1, 3, 3, generator=generator, dtype=torch.float64),
        "number": torch.tensor(2.5),
        "mark": torch.zeros(0),
        "naïve.weight": torch.ones(2),
    }
    file = tmp_path / "new folder" / "x.safetensors"
    entries = [entry(name, value) for name, value in values.items()]
    entries.append(TensorEntry("wide", (1,), lambda: torch.tensor([1e-30]), torch.float32))
    write_entries(file, entries, dtype, {"said": "ü"})
    found = load_file(file)
    assert found.pop("wide").item() == torch.tensor(1e-30).item()
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], value.to(dtype)) for name, value in values.items())
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "said": "ü"}
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    widths = {"F32": 4, "F16": 2, "BF16": 2}
    tensors = [(start + t["data_offsets"][0], widths[t["dtype"]]) for k, t in header.items() if k != "__metadata__"]
    assert all(place % width == 0 for place, width in tensors)


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref] = []

    def make() -> torch.Tensor:
        gc.collect()
        assert [ref for ref in made if ref() is not None] == []
        value = torch.ones(100)
        made.append(weakref.ref(value))
        return value

    write_entries(tmp_path / "x.safetensors", [TensorEntry(f"{i}", (100,), make) for i in range(4)], torch.float16, {})
    assert len(made) == 4


@pytest.mark.parametrize(
    ("entries", "dtype", "words"),
    [
        ([entry("big", torch.tensor([1.0, 7e4]))], "fp16", r"big .* not finite in fp16 \(up to 7e\+04\); .*bf16"),
        ([entry("nan", torch.tensor(float("nan")))], "fp32", "nan has values that are not finite$"),
        (
            [entry("a", torch.zeros(1)), TensorEntry("b", (2,), lambda: torch.zeros(3))],
            "fp32",
            r"b has shape \(3,\), \(2,\)",
        ),
        ([entry("a", torch.zeros(1)), entry("a", torch.zeros(1))], "fp32", "given twice, e.g. a"),
    ],
)
def test_a_failure_leaves_the_file_that_was_there(tmp_path: Path, entries, dtype: str, words: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_text("was here")
    with pytest.raises(ExportError, match=words):
        write_entries(file, entries, DTYPES[dtype], {})
    assert file.read_text() == "was here"
    assert list(tmp_path.iterdir()) == [file]


def test_bf16_takes_what_fp16_cannot(tmp_path: Path) -> None:
    write_entries(tmp_path / "x.safetensors", [entry("big", torch.tensor(7e4))], torch.bfloat16, {})
    assert load_file(tmp_path / "x.safetensors")["big"].item() == torch.tensor(7e4).bfloat16().item()


def test_where_a_file_may_go(tmp_path: Path) -> None:
    there, source = tmp_path / "there.safetensors", tmp_path / "source.safetensors"
    there.touch()
    source.touch()
    with pytest.raises(ExportError, match=r"there.safetensors exists; .* --overwrite"):
        check_out(there, overwrite=False)
    check_out(there, overwrite=True)
    check_out(tmp_path / "new.safetensors", overwrite=False)
    with pytest.raises(ExportError, match=r"x.ckpt: give a file that ends in .safetensors"):
        check_out(tmp_path / "x.ckpt", overwrite=False)
    with pytest.raises(ExportError, match="one of the files that would be read"):
        check_out(tmp_path / "x" / ".." / "source.safetensors", overwrite=True, sources=[source])
    with pytest.raises(ExportError, match="one of the files that would be read"):
        check_out(there, overwrite=True, sources=[tmp_path])
    check_out(tmp_path / "new.safetensors", overwrite=True, sources=[tmp_path])
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        check_out(tmp_path / "folder.safetensors", overwrite=True)
