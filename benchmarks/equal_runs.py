"""How equal are runs of several processes to a run of one? On the embedded world, with DDP and with FSDP2 (gloo).

    python -m benchmarks.equal_runs --out benchmarks/results/equal_runs

Every objective with LoRA and with all weights: three optimiser steps of 16 pairs, in one process as 8 pairs and two
micro-batches, in two processes as 4 pairs and two micro-batches. Then Diffusion-DPO in other shapes of the same 16
pairs. The residual is |weights − those of one process|, divided by |weights of one process − those at the start|, of
all trained weights together; a LoRA's weights are its products B A here. Adam's epsilon is 1e-4: with a small one its
first step is lr · sign(gradient), and rounding would decide the sign of a gradient that is 0.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffalign.config.schema import load_config, packaged_config, save_config
from diffalign.models.loading.base import load_base
from diffalign.world import base_path
from tests.invariants.pool import Pool

LEAST = [  # settings of all runs
    "training.max_train_steps=3",
    "training.lr_warmup_steps=0",
    "training.adam_epsilon=1e-4",
    "training.checkpointing_steps=null",
    "training.checkpoints_total_limit=null",
    "training.logging_steps=1",
    "training.report_to=none",
]
OBJECTIVES = {  # of the packaged configs, with fewer steps of sampling and inversion
    "dpo": [],
    "mapo": [],
    "inpo": ["objective.steps=4"],
    "inversion_dpo": [  # its points backpropagated one at a time
        "objective.steps=3",
        "objective.substeps=2",
        "objective.points_per_step=null",
        "objective.points_per_forward=1",
        "data.cache_dir=null",
        "data.cache_trajectories=false",
    ],
    "spo": ["source.prompts_per_round=12", "source.sampling_steps=6", "source.plain_steps=2"],
    "seppo": [
        "objective.flip=none",  # a flip turns rounding at D = 0 into a sign
        "source.reference=latest",
        "source.updates_per_iteration=1",
        "source.images_per_iteration=15",
        "source.sampling_steps=2",
    ],
}
METHODS = {"full": [], "lora": ["tuning.method=lora", "tuning.rank=8", "training.learning_rate=1e-4"]}
SHAPES = [(1, 16, 1), (1, 2, 8), (2, 8, 1), (2, 4, 2), (2, 1, 8)]  # processes, pairs of each, micro-batches


@dataclass(frozen=True)
class Run:
    """One run of several processes, or of one in another shape."""

    objective: str
    method: str
    strategy: str  # "one process", "DDP" or "FSDP2"
    processes: int
    pairs: int  # of a process in a micro-batch
    accumulation: int

    @property
    def job(self) -> str:
        """What a process of the pool is asked to do."""
        return "train_sharded" if self.strategy == "FSDP2" else "train"


@dataclass(frozen=True)
class Row:
    """A run beside that of one process with 8 pairs in two micro-batches."""

    run: Run
    residual: float  # of the movement of all trained weights
    largest: float  # difference of a single weight
    loss: float  # largest difference of a step's loss


class Trainings:
    """Runs in pools of one and of two processes; each is trained once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for n in (1, 2):
            (folder / f"pool-{n}").mkdir(parents=True)
        self.pools = {n: Pool(folder / f"pool-{n}", n) for n in (1, 2)}
        self.start = dict(load_base(base_path()).unet.state_dict())

    def train(self, run: Run) -> tuple[dict[str, Tensor], list[float]]:
        """The final weights and the loss of each step."""
        name = "-".join(str(value).replace(" ", "_") for value in asdict(run).values())
        out = self.folder / name
        if not out.exists():
            config = load_config(
                packaged_config(f"world/{run.objective}.yaml"),
                [
                    *LEAST,
                    *OBJECTIVES[run.objective],
                    *METHODS[run.method],
                    f"training.train_batch_size={run.pairs}",
                    f"training.gradient_accumulation_steps={run.accumulation}",
                    f"output_dir={out}",
                ],
            )
            save_config(config, self.folder / f"{name}.yaml")
            for answer in self.pools[run.processes].run(run.job, self.folder / f"{name}.yaml"):
                if answer.code:
                    raise RuntimeError(f"{run}: {answer.stderr[-3000:]}")
        lora = out / "pytorch_lora_weights.safetensors"
        weights = load_file(lora if lora.exists() else out / "unet/diffusion_pytorch_model.safetensors")
        lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
        return weights, [line["loss"] for line in lines]

    def row(self, run: Run) -> Row:
        """A run compared with one process."""
        one, its_losses = self.train(Run(run.objective, run.method, "one process", 1, 8, 2))
        other, losses = self.train(run)
        start = {name: self.start.get(name, torch.zeros_like(value)) for name, value in one.items()}
        if run.method == "lora":  # A starts at random numbers: what moves the network is B A
            one, other = _updates(one), _updates(other)
            start = {name: torch.zeros_like(value) for name, value in one.items()}
        return Row(
            run,
            _norm(one, other) / _norm(one, start),
            max(float((one[name] - other[name]).abs().max()) for name in one),
            max(abs(a - b) for a, b in zip(its_losses, losses, strict=True)),
        )

    def close(self) -> None:
        """Ends the processes."""
        for pool in self.pools.values():
            pool.close()


def _updates(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """B A of each layer."""
    names = [name for name in lora if "lora_A" in name or "lora.down" in name]
    pairs = {name: name.replace("lora_A", "lora_B").replace("lora.down", "lora.up") for name in names}
    return {down: lora[up].double() @ lora[down].double() for down, up in pairs.items()}


def _norm(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Root of the sum of all squared differences."""
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in a) ** 0.5)


def runs() -> list[Run]:
    """All that are compared."""
    found = [Run(o, m, s, 2, 4, 2) for o in OBJECTIVES for m in METHODS for s in ("DDP", "FSDP2")]
    for processes, pairs, accumulation in SHAPES:
        for strategy in ("one process",) if processes == 1 else ("DDP", "FSDP2"):
            found.append(Run("dpo", "full", strategy, processes, pairs, accumulation))
    return list(dict.fromkeys(found))


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| objective | tuning | processes × pairs × micro-batches | by | residual | of a weight | of the loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        r = row.run
        shape = f"{r.processes} × {r.pairs} × {r.accumulation}"
        numbers = f"{row.residual:.1e} | {row.largest:.1e} | {row.loss:.1e}"
        lines.append(f"| {r.objective} | {r.method} | {shape} | {r.strategy} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Runs everything and writes OUT.json and OUT.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/equal_runs"))
    parser.add_argument("--only", help="one objective")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainings, rows = Trainings(Path(folder)), []
        try:
            for run in runs():
                if args.only in (None, run.objective):
                    rows.append(trainings.row(run))
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
        finally:
            trainings.close()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    head = f"# Runs of several processes beside one\n\ntorch {torch.__version__}, CPU, gloo, float32\n\n"
    args.out.with_suffix(".md").write_text(f"{head}{(__doc__ or '').split(chr(10) * 2, 2)[2]}\n{table(rows)}\n")


if __name__ == "__main__":
    main()
