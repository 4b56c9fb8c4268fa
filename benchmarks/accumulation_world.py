"""How much precision a gradient loses when it is summed in bfloat16, for Diffusion-DPO on the embedded world.

    python -m benchmarks.accumulation_world --out runs/accumulation      # OUT.json and OUT.md, minutes

It compares the sum in bfloat16 with the sum in float64, at equal weights and one pair a micro-step, for the weights
that `adamw_bf16` stores in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from benchmarks.memory import table
from benchmarks.ours import Ours
from diffalign.config.schema import Config, load_config, packaged_config
from diffalign.engine.measure import measure_and_backward
from diffalign.objectives.base import ask
from diffalign.training.run import environment

MARKS = (8, 32, 64, 128, 512, 2048)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.md")
    p.add_argument("--steps", type=int, nargs="+", default=list(MARKS), help="numbers of micro-steps to look at")
    a = p.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = losses(Path(folder), a.steps)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.with_suffix(".json").write_text(json.dumps({"lost": found, "environment": environment()}, indent=2) + "\n")
    rows = [[str(n), f"{lost['relative_error']:.2%}", f"{lost['norm']:.4f}"] for n, lost in found.items()]
    text = table(["micro-steps", "relative error", "norm / its own in float64"], rows)
    a.out.with_suffix(".md").write_text(text)
    print(text)


def losses(folder: Path, marks: Sequence[int]) -> dict[int, dict[str, float]]:
    """Number of micro-steps -> relative error of the bfloat16 sum, and its norm over the exact one's."""
    changes = ["training.mixed_precision=bf16", "training.optimizer=adamw_bf16", "training.train_batch_size=1"]
    config = load_config(
        packaged_config("world/dpo.yaml"), [*changes, f"output_dir={folder}", "training.report_to=none"]
    )
    assert isinstance(config, Config), "the world's DPO tunes a base"
    run = Ours(config).run
    batches, found = run.source.batches(), {}
    weights = [p for p in run.parameters if p.dtype == torch.bfloat16]
    exact, rounded = [torch.zeros_like(p, dtype=torch.float64) for p in weights], [torch.zeros_like(p) for p in weights]
    for step in range(1, max(marks) + 1):
        measure_and_backward(run.networks, ask(run.objective, next(batches), run.networks), run.objective.score)
        for p, whole, sum_ in zip(weights, exact, rounded, strict=True):
            assert p.grad is not None
            whole += p.grad
            sum_ += p.grad
        run.optimizer.zero_grad(set_to_none=True)
        if step in marks:
            found[step] = _compare(exact, rounded)
    return found


def _compare(exact: list[Tensor], rounded: list[Tensor]) -> dict[str, float]:
    whole, sum_ = (torch.cat([x.detach().double().flatten() for x in each]) for each in (exact, rounded))
    return {
        "relative_error": float((sum_ - whole).norm() / whole.norm()),
        "norm": float(sum_.norm() / whole.norm()),
    }


if __name__ == "__main__":
    main()
