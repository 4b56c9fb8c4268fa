"""Pickles become safetensors without importing or running anything that they name."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffalign.rewards.released.convert import main


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


def test_a_pickled_module_gives_its_state_dict(authors, tmp_path, monkeypatch, capsys):
    model = authors.Model()
    torch.save(model, tmp_path / "model.pth")
    expected = model.state_dict()
    monkeypatch.delitem(sys.modules, authors.__name__)
    main([str(tmp_path / "model.pth"), str(tmp_path / "new.safetensors")])
    found = load_file(tmp_path / "new.safetensors")
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], value) and found[name].dtype == torch.float16 for name, value in expected.items()
    )
    assert "4 tensors" in capsys.readouterr().out


def test_a_state_dict_is_taken_as_it_is(tmp_path):
    state = {"a": torch.arange(4.0)[::2], "b": torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    main([str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors")])
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.tensor([0.0, 2.0]))


class Runs:
    """Pickled as a call."""

    def __init__(self, call, argument):
        self.call, self.argument = call, argument

    def __reduce__(self):
        return self.call, (self.argument,)


def test_no_code_of_a_file_runs(tmp_path, capsys):
    import os

    mark = tmp_path / "mark"
    for number, runs in enumerate((Runs(os.system, f"touch {mark}"), Runs(exec, f"open({str(mark)!r}, 'w')"))):
        torch.save({"a": torch.ones(1), "b": runs}, tmp_path / f"{number}.pt")
        with pytest.raises(SystemExit):
            main([str(tmp_path / f"{number}.pt"), str(tmp_path / "new.safetensors")])
        assert not mark.exists()
        assert not (tmp_path / "new.safetensors").exists()
    messages = capsys.readouterr().err
    assert "whose module posix is blocked" in messages
    assert "neither a state dict" in messages


def test_wrong_files_and_names_are_refused(tmp_path, capsys):
    (tmp_path / "page.pt").write_text("<html>")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "old.safetensors").touch()
    for name, new, words in (
        ("page.pt", "new.safetensors", "is not read"),
        ("list.pt", "new.safetensors", "neither a state dict"),
        ("none.pt", "new.safetensors", "there is no file"),
        ("list.pt", "new.pt", "does not end in .safetensors"),
        ("list.pt", "old.safetensors", "exists already"),
    ):
        with pytest.raises(SystemExit):
            main([str(tmp_path / name), str(tmp_path / new)])
        assert words in capsys.readouterr().err
