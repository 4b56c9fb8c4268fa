"""The table of equal runs has every case, its numbers are small, and the documentation shows them.

`tests/invariants/test_processes.py` trains such runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import sharded_memory
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


@pytest.mark.parametrize("unet", ["SDXL, counted", "small, measured"])
def test_what_a_process_holds_falls_with_their_number(unet: str) -> None:
    rows = json.loads((ROOT / "benchmarks/results/sharded_memory.json").read_text())
    totals = {row["processes"]: sharded_memory.total(row) for row in rows if row["unet"] == unet}
    assert list(totals) == [1, 2, 4, 8]
    assert all(n * total == pytest.approx(totals[1], rel=0.05) for n, total in totals.items())
    assert sharded_memory.table(rows) in (ROOT / "benchmarks/results/sharded_memory.md").read_text()


def test_half_of_a_small_unet_is_counted_for_each_of_two_processes() -> None:
    config = {**sharded_memory.SMALL_UNET, "transformer_layers_per_block": (1, 1, 1)}
    one, two = sharded_memory.counted(config, 1), sharded_memory.counted(config, 2)
    assert one["states"] == 2 * one["weights"] == 2 * one["gradients"]
    for part in sharded_memory.PARTS:
        assert two[part] == pytest.approx(one[part] / 2, rel=0.05)
