"""What the safeguard of Diffusion-SDPO does to likelihood displacement, on the embedded world.

    python -m benchmarks.safeguard_world --out runs/safeguard            # every run, then the table
    python -m benchmarks.safeguard_world --out runs/safeguard --table

Diffusion-DPO at a learning rate at which the health rule `displacement` speaks, without the safeguard and with it, for
several seeds. The rule speaks on a logged line where the window of lines that ends there
is bad. Each final model is
compared with the base on the world's held-out prompts. A finished run is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from diffalign.arena.board import guards
from diffalign.config.schema import Config, load_config, packaged_config
from diffalign.evaluation.evaluate import evaluate
from diffalign.evaluation.sampling import Sampling
from diffalign.evaluation.scoring import Scoring
from diffalign.training.callbacks.health_rules import RULES, Limits
from diffalign.training.checkpoints.final_weights import is_finished
from diffalign.training.run import environment, run_training
from diffalign.world import base_path
from diffalign.world.captions import prompts

RATE, STEPS, EVERY = 5e-5, 60, 4
PICTURES = 2  # of each prompt and model
MUS = (None, 0.9)  # None: no safeguard; 0.9: the release's for SD1.5
SHOWN = ("displacement", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "safeguard")


def run(folder: Path, mu: float | None, seed: int) -> Path:
    """Trains one run, if it is not finished, and returns its folder."""
    changes = [
        f"output_dir={folder}",
        f"seed={seed}",
        f"training.learning_rate={RATE}",
        f"training.max_train_steps={STEPS}",
        f"training.logging_steps={EVERY}",
        "training.checkpointing_steps=null",
        "training.checkpoints_total_limit=null",
        "training.report_to=none",
        "overwrite_output_dir=true",
    ]
    changes += [] if mu is None else [f"objective.safeguard_mu={mu}"]
    if not is_finished(folder):
        run_training(load_config(packaged_config("world/dpo.yaml"), changes))
    return folder


def kind(mu: float | None) -> str:
    """The name of a kind of run."""
    return "dpo" if mu is None else f"mu_{mu:g}"


def spoken(folder: Path) -> dict[str, Any]:
    """What the lines of a run say: on how many of them the rule holds, and means over the last third of the run."""
    config = load_config(folder / "config.yaml")
    assert isinstance(config, Config)
    limits = Limits(config.health, config.training)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    bad = [RULES["displacement"].check(lines[: i + 1], limits) is not None for i in range(len(lines))]
    last = lines[2 * len(lines) // 3 :]
    means = {name: mean(line[name] for line in last) for name in SHOWN if name in last[0]}
    return {"lines": len(bad), "spoken": sum(bad), **means}


def compared(folders: dict[str, Path], out: Path) -> dict[str, dict[str, Any]]:
    """The final models beside the base on held-out prompts: gain in the true reward, and the guards."""
    found = evaluate(
        str(base_path()),
        {name: str(folder / "unet") for name, folder in folders.items()},
        prompts("heldout"),
        range(PICTURES),
        scorers=Scoring(("world",), faithfulness="world-accuracy"),
        sampling=Sampling(num_inference_steps=20, guidance_scale=5.0, device="cpu"),
        out_dir=out,
    )
    rows = {}
    for model in found.models:
        gain, accuracy, diversity = model.scores["world"].gain, model.faithfulness, model.diversity
        assert accuracy is not None
        assert diversity is not None
        rows[model.name] = {
            "gain": [gain.value, gain.low, gain.high],
            "accuracy": accuracy.gain.value,
            "diversity": diversity.value,
            "guards": guards(accuracy.gain.value, diversity.value),
        }
    return rows


def of_seed(out: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Every kind of run with one seed; read from its file where that is there."""
    file = out / f"{seed}.json"
    if not file.is_file():
        folders = {kind(mu): run(out / kind(mu) / str(seed), mu, seed) for mu in MUS}
        rows = compared(folders, out / "evaluation" / str(seed))
        file.write_text(json.dumps({name: {**spoken(f), **rows[name]} for name, f in folders.items()}, indent=1) + "\n")
    found: dict[str, dict[str, Any]] = json.loads(file.read_text())
    return found


def table(seeds: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A line for each kind of run: the rule's share of the logged lines, seed by seed, and means over the seeds."""
    head = ("", "rule speaks, by seed", "displacement", "rewards/chosen", "rewards/rejected", "accuracy of pairs", "λ",
            "dR, by seed", "dR", "accuracy", "diversity")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for mu in MUS:
        rows = [found[kind(mu)] for found in seeds.values()]

        def of(name: str, rows: list[dict[str, Any]] = rows) -> float:
            return mean(row[name] for row in rows)

        cells = [
            kind(mu),
            ", ".join(f"{row['spoken'] / row['lines']:.0%}" for row in rows),
            f"{of('displacement'):.0%}",
            f"{of('rewards/chosen'):+.2f}",
            f"{of('rewards/rejected'):+.2f}",
            f"{of('rewards/accuracies'):.0%}",
            "" if mu is None else f"{of('safeguard'):.2f}",
            ", ".join(f"{row['gain'][0]:+.3f}" for row in rows),
            f"{mean(row['gain'][0] for row in rows):+.3f}",
            f"{of('accuracy'):+.3f}",
            f"{of('diversity'):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is not there yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, help="also write the figures to RESULTS.json and RESULTS.md")
    a = parser.parse_args()
    torch.set_num_threads(1)
    seeds = {str(seed): of_seed(a.out, seed) for seed in a.seeds}
    text = table(seeds)
    print(text)
    if a.results is not None:
        settings = {"learning_rate": RATE, "steps": STEPS, "logging_steps": EVERY, "pictures": PICTURES}
        content = {"settings": settings, "environment": environment(), "seeds": seeds}
        a.results.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        a.results.with_suffix(".md").write_text(f"{__doc__.splitlines()[0]}\n\n{text}\n")


if __name__ == "__main__":
    main()
