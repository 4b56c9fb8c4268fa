"""Writes the latent judge of a finished run in float16: half the size. The world's committed judge is made so.

diffalign data world runs/world/judge_pairs.parquet --pairs 32768 --seed 1
diffalign train training_configs/world/latent_judge.yaml output_dir=runs/world/judge
    data.path=runs/world/judge_pairs.parquet training.max_train_steps=1500
python -m diffalign.contrib.latent_judge.pack --run runs/world/judge --out assets/world/judge/latent
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from diffalign.contrib.latent_judge.files import load_judge, save_judge


def pack(run: Path, folder: Path) -> None:
    """Writes the judge in the output folder of a run into `folder`, in float16."""
    judge, tokenizers, facts = load_judge(str(run))
    save_judge(judge, tokenizers, facts, folder, torch.float16)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m diffalign.contrib.latent_judge.pack", description="write a run's latent judge in float16"
    )
    parser.add_argument("--run", required=True, type=Path, help="output folder of the run")
    parser.add_argument("--out", required=True, type=Path, help="folder of the judge")
    arguments = parser.parse_args()
    pack(arguments.run, arguments.out)


if __name__ == "__main__":
    main()
