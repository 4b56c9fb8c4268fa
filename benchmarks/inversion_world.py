"""The inversion family on the embedded world: settings × training seeds, evaluated on held-out prompts.

    python benchmarks/inversion_world.py --out runs/inversion                        # everything
    python benchmarks/inversion_world.py --out runs/inversion --only inpo smpo --seeds 0 1 2 --start base sft
    python benchmarks/inversion_world.py --out runs/inversion --table                # the table of what is there

One line of the table is one setting from one start (the base, or an SFT checkpoint of it), trained once for each seed.
Training is `run_training` on a config, evaluation is `evaluate` with the world's reward, clustered by prompt; gains
are over the start, on the same prompts and seeds.

A finished line is a file in OUT/lines and is not done again, and nor is a finished training run; OUT/settings.json
holds what all lines share, and another value is refused. Several processes may share OUT as long as their lines
differ and the SFT start is there before: every one of them computes on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from diffalign.config import parse_config
from diffalign.evaluation.evaluate import evaluate
from diffalign.training.run import environment, run_training
from diffalign.world import base_path, pairs_path
from diffalign.world.captions import prompts

# β = 2000 as in the world's DPO. Scores of the world span about two units.
INPO = {"name": "inpo", "beta": 2000}
SMPO = {"name": "smpo", "beta": 2000, "score_low": 0.0, "score_high": 2.0}
# The grid of 20 points with two of them drawn for each pair and visit; w divided by its mean, so that β is DPO's.
IDPO = {
    "name": "inversion_dpo",
    "beta": 2000,
    "steps": 20,
    "normalise": True,
    "points_per_step": 2,
    "points_per_forward": None,
}
FINER = {**IDPO, "steps": 10, "substeps": 8, "weighting": "uniform", "normalise": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 2000},
    "inpo": INPO,
    "inpo, eta 0": {**INPO, "eta": 0.0},
    "inpo, 40 steps": {**INPO, "steps": 40},
    "inpo, 40 steps, eta 0": {**INPO, "steps": 40, "eta": 0.0},
    "inpo, 15 steps, quadratic": {**INPO, "steps": 15, "grid": "quadratic"},
    "inpo, 15 steps, quadratic, eta 0": {**INPO, "steps": 15, "grid": "quadratic", "eta": 0.0},
    "smpo": SMPO,
    "smpo, 10 steps, quadratic": {**SMPO, "steps": 10, "grid": "quadratic"},
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
    "idpo residual, finer path, own trajectory, no guidance": {**FINER, "guidance": 1.0, "trajectory": "policy"},
}
STARTS = ("base", "sft")
SCORERS = ("world", "world-size")
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
            if finished(file, SETTINGS[setting], a.seeds):
                print(f"{start} / {setting}: done before", flush=True)
                continue
            line = measure_line(a, start, model, setting)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(line, indent=2) + "\n")
            partial.replace(file)
            print(row(line), flush=True)
    lines = [json.loads(file.read_text()) for file in sorted((a.out / "lines").glob("*.json"))]
    (a.out / "result.json").write_text(json.dumps(lines, indent=2) + "\n")
    (a.out / "table.md").write_text(table(lines))
    print(table(lines))


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


def finished(file: Path, objective: dict[str, Any], seeds: list[int]) -> bool:
    """Whether a line is there, of this objective and these training seeds."""
    if not file.exists():
        return False
    line = json.loads(file.read_text())
    if line["objective"] != objective:
        raise SystemExit(f"{file} is of {line['objective']}, and the setting is now {objective}; name another --out")
    return bool(line["seeds"] == seeds)


def measure_line(a: argparse.Namespace, start: str, model: Path, setting: str) -> dict[str, Any]:
    """Trains a setting once for each seed and compares the runs with their start."""
    runs = []
    for seed in a.seeds:
        out = a.out / "runs" / start / name_of(setting) / f"seed{seed}"
        train(a, model, SETTINGS[setting], out, seed, a.steps)
        runs.append(str(out))
    result = evaluate(
        str(model),
        {setting: runs},
        prompts(a.split),
        range(a.pictures),
        scorers=SCORERS,
        faithfulness="world-accuracy",
        steps=20,
        guidance=5.0,
        out_dir=a.out / "evaluation" / start / name_of(setting),
        grid_rows=8,
        progress=False,
    )
    found = result.models[0]

    def interval(e: Any) -> list[float]:
        return [e.value, e.low, e.high]

    return {
        "start": start,
        "setting": setting,
        "objective": SETTINGS[setting],
        "seeds": a.seeds,
        "steps": a.steps,
        "batch": a.batch,
        "learning_rate": a.lr,
        "pairs": a.pairs.name,
        "split": a.split,
        "gain": {name: interval(paired.gain) for name, paired in found.scores.items()},
        "gain_by_seed": found.run_gains,
        "win_rate": interval(found.scores[SCORERS[0]].win_rate),
        "accuracy": [found.faithfulness.base, found.faithfulness.tuned] if found.faithfulness else None,
        "diversity": interval(found.diversity) if found.diversity else None,
        "last_metrics": [last_metrics(Path(run)) for run in runs],
        "environment": environment(),
        "training_seconds": [float((Path(run) / "seconds").read_text()) for run in runs],
    }


def train(a: argparse.Namespace, model: Path, objective: dict[str, Any], out: Path, seed: int, steps: int) -> None:
    """One run, unless its final weights are there already; an unfinished one is started again."""
    if (out / "seconds").is_file():
        return
    config = {
        "output_dir": str(out),
        "overwrite_output_dir": True,
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
    begun = time.perf_counter()
    run_training(parse_config(config, where=f"{objective['name']}, seed {seed}"))
    (out / "seconds").write_text(f"{time.perf_counter() - begun:.1f}\n")


def start_model(a: argparse.Namespace, start: str) -> Path:
    """The pipeline folder that training starts from and refers to: the base, or the base after SFT on the pairs."""
    if start == "base":
        return base_path()
    folder, run = a.out / "start-sft", a.out / "runs" / "start-sft"
    train(a, base_path(), {"name": "sft"}, run, seed=0, steps=a.sft_steps)
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.copytree(base_path(), partial, ignore=shutil.ignore_patterns("unet"), dirs_exist_ok=True)
        shutil.copytree(run / "unet", partial / "unet", dirs_exist_ok=True)
        partial.rename(folder)
    return folder


def last_metrics(run: Path) -> dict[str, float]:
    """The last line of a run's log."""
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def name_of(setting: str) -> str:
    """The setting as part of a path."""
    return setting.replace(", ", "-").replace(" ", "_")


def line_file(out: Path, start: str, setting: str) -> Path:
    """Where a finished line is kept."""
    return out / "lines" / f"{start}-{name_of(setting)}.json"


def table(lines: list[dict[str, Any]]) -> str:
    """All lines as Markdown, in the order of SETTINGS."""
    order = {name: i for i, name in enumerate(SETTINGS)}
    head = ("start", "setting", "dR", "dR by seed", "dR size", "win rate", "accuracy", "diversity", "s/step")
    ordered = sorted(lines, key=lambda line: (line["start"], order.get(line["setting"], len(order))))
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *map(row, ordered)]) + "\n"


def row(line: dict[str, Any]) -> str:
    """One line of the table; brackets are 95 % intervals, clustered by prompt."""

    def interval(values: list[float] | None, form: str) -> str:
        return "-" if values is None else f"{values[0]:{form}} [{values[1]:{form}}, {values[2]:{form}}]"

    reward, size = SCORERS
    cells = (
        line["start"],
        line["setting"],
        interval(line["gain"][reward], "+.3f"),
        " ".join(f"{gain:+.3f}" for gain in line["gain_by_seed"][reward]),
        interval(line["gain"][size], "+.3f"),
        interval(line["win_rate"], ".2f"),
        " → ".join(f"{value:.3f}" for value in line["accuracy"] or ()),
        interval(line["diversity"], ".2f"),
        f"{sum(line['training_seconds']) / (len(line['seeds']) * line['steps']):.2f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
