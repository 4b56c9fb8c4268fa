"""The table of equal runs has every case, its numbers are small, and the documentation shows them.

`tests/invariants/test_processes.py` trains such runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.equal_runs import Row, Run, _norm, _updates, runs, table

ROOT = Path(__file__).parents[2]


def test_a_loras_update_and_the_norm_by_hand() -> None:
    lora = {"q.lora_A.weight": torch.tensor([[3.0, 0.0]]), "q.lora_B.weight": torch.tensor([[1.0], [2.0]])}
    update = _updates(lora)["q.lora_A.weight"]
    assert update.tolist() == [[3.0, 0.0], [6.0, 0.0]]
    assert _norm({"q": update}, {"q": torch.tensor([[0.0, 0.0], [2.0, 0.0]])}) == 5.0


def test_every_case_is_measured_and_differs_by_rounding_alone() -> None:
    found = json.loads((ROOT / "benchmarks/results/equal_runs.json").read_text())
    rows = [Row(Run(**row.pop("run")), **row) for row in found]
    assert [row.run for row in rows] == runs()
    assert max(row.residual for row in rows) < 1e-4
    written, page = ((ROOT / file).read_text() for file in ("benchmarks/results/equal_runs.md", "docs/distributed.md"))
    assert written.endswith(f"{table(rows)}\n")
    assert all(f"{row.residual:.1e}" in page for row in rows)
