"""Pickles become safetensors without importing or running anything that they name."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffalign.errors import ModelError
from diffalign.io.pickles import read_pickle


@pytest.fixture
def authors(monkeypatch):
    """A package of modules that exists while the file is written, and not when it is read."""
    module = types.ModuleType("trainer_of_authors.models")

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3))
            self.empty = None
            self.register_buffer("bias", torch.randn(2))
            self.register_buffer("cache", torch.randn(4), persistent=False)
            self.register_parameter("unused", None)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(), nn.Sequential(Layer(), nn.GELU())]).half()
            self.config = {"kind": torch.float16, "activation": torch.nn.functional.gelu}

    for cls in (Layer, Model):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "trainer_of_authors", types.ModuleType("trainer_of_authors"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_pickled_module_gives_its_state_dict(authors, tmp_path, monkeypatch):
    model = authors.Model()
    torch.save(model, tmp_path / "model.pth")
    torch.save({"model": model, "epoch": 3, "args": authors.Layer}, tmp_path / "wrapped.pth")
    expected = model.state_dict()
    monkeypatch.delitem(sys.modules, authors.__name__)
    for name, left_out in (("model.pth", ()), ("wrapped.pth", ("epoch (int)", "args (type)"))):
        found = read_pickle(tmp_path / name)
        assert found.tensors.keys() == expected.keys()
        assert all(
            torch.equal(found.tensors[key], value) and found.tensors[key].dtype == torch.float16
            for key, value in expected.items()
        )
        assert found.left_out == left_out


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_share_memory_are_written_apart(tmp_path, zipped):
    whole = torch.arange(6.0)
    state = {"half": whole[::2], "part": whole[:3], "all": whole, "again": whole, "b": torch.ones(2, 3).t()}
    torch.save({"state_dict": state}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = read_pickle(tmp_path / "a.pt").tensors
    save_file(found, tmp_path / "a.safetensors")  # refuses shared memory
    written = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(written[name], value) for name, value in state.items())


class Runs:
    """Pickled as a call."""

    def __init__(self, call, argument):
        self.call, self.argument = call, argument

    def __reduce__(self):
        return self.call, (self.argument,)


def test_no_code_of_a_file_runs(tmp_path):
    import os

    mark = tmp_path / "mark"
    runs = (
        (Runs(os.system, f"touch {mark}"), "whose module posix is blocked"),
        (Runs(exec, f"open({str(mark)!r}, 'w')"), r"neither a state dict.*holds b \(exec\), a \(tensor\)"),
    )
    for number, (call, message) in enumerate(runs):
        torch.save({"a": torch.ones(1), "b": call}, tmp_path / f"{number}.pt")
        with pytest.raises(ModelError, match=message):
            read_pickle(tmp_path / f"{number}.pt")
        assert not mark.exists()


def test_which_entry_is_meant(tmp_path):
    one, two = {"a": torch.ones(1)}, {"a": torch.zeros(1)}
    torch.save({"state_dict": one, "ema": two, "step": 5, "optimizer": {"lr": 1.0}}, tmp_path / "both.ckpt")
    with pytest.raises(ModelError, match=r"several state dicts, state_dict, ema: choose one \(--key state_dict\)"):
        read_pickle(tmp_path / "both.ckpt")
    found = read_pickle(tmp_path / "both.ckpt", key="ema")
    assert torch.equal(found.tensors["a"], two["a"])
    assert found.left_out == ("state_dict (dict)", "step (int)", "optimizer (dict)")
    for key, message in (("ema2", r"no entry 'ema2'; it holds state_dict \(dict\)"), ("step", "neither a state dict")):
        with pytest.raises(ModelError, match=message):
            read_pickle(tmp_path / "both.ckpt", key=key)


def test_files_without_weights_are_refused(tmp_path):
    (tmp_path / "page.pt").write_text("<html>")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": torch.ones(2), "epoch": 3}, tmp_path / "mixed.pt")
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "sparse.pt")
    for name, words in (
        ("page.pt", "is not read"),
        ("list.pt", r"neither a state dict .* it holds list"),
        ("mixed.pt", r"it holds epoch \(int\), a \(tensor\)"),
        ("sparse.pt", "sparse or quantised"),
        ("none.pt", "there is no file"),
    ):
        with pytest.raises(ModelError, match=words):
            read_pickle(tmp_path / name)
