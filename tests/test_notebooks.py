"""The notebooks run from top to bottom, with fewer steps than a reader takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The cell of parameters, and what the outputs must contain: a text, and so many pictures.
SMALL = {
    "01_one_pair.ipynb": ("PAIR = 0\nPAIRS = 2\nSTEPS = 1", "0.6931", 4),
    "02_inversion.ipynb": (
        'PROMPT = "a red apple on a blue background"\nSEED = 3\nFINE = 250\nSTRIDES = [250, 500]\nPAIRS = 2',
        "error of the round trip",
        5,
    ),
    "03_tune_and_compare.ipynb": (
        "STEPS = 2\nBATCH = 2\nRATE = 7e-4\nPROMPTS = 3\nSAMPLING_STEPS = 2\nSEEDS = range(1)",
        "clustered by prompt",
        2,
    ),
    "04_your_own_pairs.ipynb": (
        'BASE = PAIRS = PROMPTS = None\nSCORERS = ["emoji"]\nRESOLUTION = 1024\nSEEDS = range(1)\nSAMPLING_STEPS = 2\n'
        "STEPS, BATCH, RATE, BETA, RANK = 2, 2, 1e-3, 4000.0, 2",
        "mine.safetensors",
        3,
    ),
    "05_write_an_objective.ipynb": ("STEPS = 2\nBATCH = 2\nBATCHES = 1", "| 0-1000 |", 1),
}


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One kernel for all notebooks: each begins without names, and finds modules imported."""
    manager = KernelManager()
    manager.start_kernel(env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=str(ROOT / "notebooks"))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.name for p in NOTEBOOKS])
def test_notebook_runs(path: Path, kernel: KernelManager) -> None:
    parameters, text, pictures = SMALL[path.name]
    notebook = nbformat.read(path, as_version=4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = parameters
    afresh = "%reset -f\nimport torch\ntorch.set_grad_enabled(True)"  # one of them turns gradients off
    notebook.cells.insert(0, nbformat.v4.new_code_cell(afresh))
    NotebookClient(notebook, km=kernel, timeout=240).execute()
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    assert text in "".join(o.get("text", "") for o in outputs)
    assert len([o for o in outputs if "image/png" in o.get("data", {})]) == pictures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.name for p in NOTEBOOKS])
def test_committed_notebook_shows_its_outputs(path: Path) -> None:
    assert os.path.getsize(path) < 500_000
    notebook = nbformat.read(path, as_version=4)
    assert f"/blob/main/notebooks/{path.name})" in notebook.cells[0].source  # the badge opens this very notebook
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    assert len([o for o in outputs if "image/png" in o.get("data", {})]) == SMALL[path.name][2]
    assert SMALL[path.name][1] in "".join(o.get("text", "") for o in outputs)
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
