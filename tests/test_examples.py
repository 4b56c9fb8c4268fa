"""Every script in examples/ runs, in its smallest form."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        name.removeprefix("test_")
        for name in globals()
        if name.startswith("test_") and name != "test_every_example_has_a_test"
    }


def test_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example("first_run", monkeypatch).main(str(tmp_path / "run"), steps=1, seeds=1)
    assert "scorer world: base mean" in capsys.readouterr().out


def test_own_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = example("own_objective", monkeypatch).main(str(tmp_path / "run"), steps=1)
    assert last["loss"] == pytest.approx(1, abs=1e-5)  # max(0, 1 - 0)
    assert last["grad_norm"] > 0
    assert "name: own_objective:HingeDPO" in (tmp_path / "run/config.yaml").read_text()


def test_own_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = example("own_scorer", monkeypatch).main(str(tmp_path / "pictures"), steps=2)
    assert scores.shape == (4,)
    assert bool((scores > 0).all())


def test_invert_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = example("invert_an_image", monkeypatch).main(strides=(100, 50))
    assert errors[50] < errors[100] < 1


def test_sweep_beta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example("sweep_beta", monkeypatch).main(str(tmp_path), betas=(500.0, 2000.0), steps=1, seeds=1)
    assert "beta=2000" in capsys.readouterr().out
