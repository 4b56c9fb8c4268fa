"""Sweep Diffusion-DPO's beta and compare the runs on held-out prompts, in one table.

python examples/sweep_beta.py
"""

from collections.abc import Sequence
from pathlib import Path

from diffalign import DiffusionDPO, FullFineTuning, Sampling, Trainer, TrainingArguments, evaluate, load_pairs
from diffalign.world import base_path, pairs_path
from diffalign.world.captions import prompts


def main(
    output_dir: str = "runs/examples/sweep_beta",
    betas: Sequence[float] = (500.0, 2000.0, 8000.0),
    steps: int = 60,
    seeds: int = 4,
) -> None:
    """Trains one run for each beta from the same pairs and seed, and prints the gains side by side."""
    pairs = load_pairs(pairs_path(), resolution=16)  # opened once for all runs
    folders = {}
    for beta in betas:
        folder = str(Path(output_dir) / f"beta_{beta:g}")
        args = TrainingArguments(
            output_dir=folder, max_train_steps=steps, train_batch_size=32, learning_rate=1e-5, report_to="none"
        )
        Trainer(base_path(), DiffusionDPO(beta=beta), pairs, args, tuning=FullFineTuning()).train()
        folders[f"beta={beta:g}"] = folder
    result = evaluate(
        str(base_path()),
        folders,
        prompts("heldout"),
        range(seeds),
        scorers=["world"],
        out_dir=Path(output_dir) / "evaluation",
        sampling=Sampling(num_inference_steps=10),
    )
    print(result.table())


if __name__ == "__main__":
    main()
