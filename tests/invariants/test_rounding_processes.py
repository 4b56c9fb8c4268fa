"""Two processes round alike: bfloat16 weights hold the same bits in each, with pairs of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffalign.config import Config, save_config
from tests.conftest import ROOT

SCRIPT = """
import sys
import torch
from diffalign.config import load_config
from diffalign.training.loop import optimizer_step
from diffalign.training.metrics import Meter
from diffalign.training.setup import build, make_accelerator

config = load_config(sys.argv[1])
accelerator = make_accelerator(config)
run = build(config, accelerator)
torch.manual_seed(accelerator.process_index)  # the global generators differ and have no part in it
batches = run.source.batches()
for _ in range(config.training.max_train_steps):
    optimizer_step(run, batches, Meter())
weights = {str(i): p.detach().cpu() for i, p in enumerate(run.parameters)}
torch.save(weights, f"{sys.argv[2]}/{accelerator.process_index}-{accelerator.num_processes}.pt")
accelerator.end_training()
"""


@pytest.mark.parametrize("optimizer", ["adamw_bf16", "adamw_8bit_bf16"])
def test_processes_hold_the_same_bits(
    optimizer: str, make_config: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path
) -> None:
    settings = {
        "tuning.method": "full",
        "training.optimizer": optimizer,
        "training.mixed_precision": "bf16",
        "training.max_train_steps": 3,
    }
    save_config(make_config(tiny_sdxl, settings), tmp_path / "config.yaml")
    (tmp_path / "steps.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        + [str(tmp_path / name) for name in ("steps.py", "config.yaml", "")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{i}-2.pt", weights_only=True) for i in range(2))
    assert sum(x.dtype == torch.bfloat16 for x in first.values()) > 50
    assert all(torch.equal(first[name], second[name]) for name in first)
