"""The inversion methods on the embedded world: settings × training seeds, evaluated on held-out prompts.

    python benchmarks/inversion_world.py --out runs/inversion                        # everything
    python benchmarks/inversion_world.py --out runs/inversion --only inpo smpo --seeds 0 1 2 --start base sft
    python benchmarks/inversion_world.py --out runs/inversion --table                # the table of the results so far

A line of the table is one setting from one start (the base, or an SFT checkpoint of it), trained once for each seed.
Training is `run_training` on a config. Evaluation is `evaluate` with the world's reward, clustered by prompt. Gains are
relative to the start, on the same prompts and seeds.

A finished line is a file in OUT/lines. Finished lines and finished training runs are not repeated. OUT/settings.json
holds the settings of all lines, and other values are refused. Several processes may share OUT if their lines differ and
the SFT start exists. Every process computes on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from world_lines import finished, line_file, measured, name_of, train, write_line, write_table

from diffalign.world import base_path, pairs_path

# β = 2000 as in the world's DPO. Scores of the world span about two units.
INPO = {"name": "inpo", "beta": 2000, "steps": 10}
SMPO = {"name": "smpo", "beta": 2000, "steps": 5, "score_low": 0.0, "score_high": 2.0}
# The grid of 20 points with two of them drawn for each pair and visit; w divided by its mean, so that β is DPO's.
IDPO = {
    "name": "inversion_dpo",
    "beta": 2000,
    "steps": 20,
    "substeps": 1,
    "guidance": 2.0,
    "weighting": "inverse_alpha",
    "normalise": True,
    "points_per_step": 2,
    "points_per_forward": None,
}
FINER = {**IDPO, "steps": 10, "substeps": 8, "weighting": "uniform", "normalise": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 2000},
    "inpo": INPO,
    "inpo, eta 0": {**INPO, "eta": 0.0},
    "inpo, 20 steps": {**INPO, "steps": 20},
    "inpo, 40 steps": {**INPO, "steps": 40},
    "inpo, 40 steps, eta 0": {**INPO, "steps": 40, "eta": 0.0},
    "smpo": SMPO,
    "smpo, 20 steps": {**SMPO, "steps": 20},
    "idpo released": {**IDPO, "form": "released"},
    "idpo released, no guidance": {**IDPO, "form": "released", "guidance": 1.0},
    "idpo released, own trajectory, no guidance": {
        **IDPO,
        "form": "released",
        "guidance": 1.0,
        "trajectory": "policy",
    },
    "idpo flipped": {**IDPO, "form": "released_flipped"},
    "idpo flipped, no guidance": {**IDPO, "form": "released_flipped", "guidance": 1.0},
    "idpo residual": IDPO,
    "idpo residual, no guidance": {**IDPO, "guidance": 1.0},
    "idpo residual, own trajectory, no guidance": {**IDPO, "guidance": 1.0, "trajectory": "policy"},
    "idpo residual, finer path": FINER,
    "idpo residual, finer path, no guidance": {**FINER, "guidance": 1.0},
}
STARTS = ("base", "sft")
SHARED = ("steps", "sft_steps", "batch", "lr", "pairs", "split", "pictures")  # arguments that all lines of OUT share


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this script."""
    a = parser().parse_args(arguments)
    torch.set_num_threads(1)
    if not a.table:
        claim(a)
    for start in () if a.table else a.start:
        model = start_model(a, start)
        for setting in a.only:
            file = line_file(a.out, start, setting)
            if finished(file, SETTINGS[setting], len(a.seeds)):
                print(f"{start} / {setting}: done before", flush=True)
                continue
            runs = [a.out / "runs" / start / name_of(setting) / f"seed{seed}" for seed in a.seeds]
            for seed, run in zip(a.seeds, runs, strict=True):
                train(config(a, model, SETTINGS[setting], seed, a.steps), run, f"{setting}, seed {seed}")
            line = measured(model, start, setting, SETTINGS[setting], runs, split=a.split, pictures=a.pictures)
            write_line(file, line)
    write_table(a.out, list(SETTINGS))


def parser() -> argparse.ArgumentParser:
    """Arguments; defaults are the world's own training settings."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    p.add_argument("--start", nargs="+", choices=STARTS, default=["base"])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="training seeds")
    p.add_argument("--steps", type=int, default=60, help="optimiser steps")
    p.add_argument("--sft-steps", type=int, default=300, help="optimiser steps of the SFT start")
    p.add_argument("--batch", type=int, default=32, help="pairs of a step")
    p.add_argument("--lr", type=float, default=1e-5)
    p.add_argument("--pairs", type=Path, default=pairs_path())
    p.add_argument("--split", choices=("heldout", "final"), default="heldout", help="prompts of the evaluation")
    p.add_argument("--pictures", type=int, default=12, help="of each prompt and model")
    p.add_argument("--table", action="store_true", help="train nothing; write the table of the finished lines")
    return p


def claim(a: argparse.Namespace) -> None:
    """Records what all lines share. Ends the program when OUT was begun with something else."""
    shared = {name: str(getattr(a, name)) for name in SHARED}
    file = a.out / "settings.json"
    if file.exists():
        before = json.loads(file.read_text())
        changed = [
            f"{name}: was {before.get(name)}, is {value}" for name, value in shared.items() if before.get(name) != value
        ]
        if changed:
            raise SystemExit(f"{a.out} was begun with other settings ({'; '.join(changed)}); name another --out")
    a.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(shared, indent=2) + "\n")


def config(a: argparse.Namespace, model: Path, objective: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """A run's config but for its folder."""
    return {
        "seed": seed,
        "model": {"pretrained_model_name_or_path": str(model)},
        "tuning": {"method": "full"},
        "objective": objective,
        "data": {
            "path": str(a.pairs),
            "resolution": 16,
            "cache_dir": str(a.out / "cache"),
            # one trajectory of every pair serves all seeds, and all forms with the same path
            "cache_trajectories": objective["name"] == "inversion_dpo" and "trajectory" not in objective,
        },
        "training": {
            "max_train_steps": steps,
            "train_batch_size": a.batch,
            "learning_rate": a.lr,
            "lr_warmup_steps": min(20, steps),
            "logging_steps": min(10, steps),
            "report_to": "none",
        },
    }


def start_model(a: argparse.Namespace, start: str) -> Path:
    """The pipeline folder that training starts from and refers to: the base, or the base after SFT on the pairs."""
    if start == "base":
        return base_path()
    folder, run = a.out / "start-sft", a.out / "runs" / "start-sft"
    train(config(a, base_path(), {"name": "sft"}, 0, a.sft_steps), run, "SFT start")
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.copytree(base_path(), partial, ignore=shutil.ignore_patterns("unet"), dirs_exist_ok=True)
        shutil.copytree(run / "unet", partial / "unet", dirs_exist_ok=True)
        partial.rename(folder)
    return folder


if __name__ == "__main__":
    main()
