"""What a round of SPO's and LPO's source costs by judge: CPU seconds, images through the policy, pairs.

    python -m benchmarks.judges_round --out runs/judges_round
    python -m benchmarks.judges_round --out runs/judges_round --also latent-judge=runs/world/judge

The policy is the embedded world's base, the settings are those of training_configs/world/spo.yaml, and every judge
samples the same prompts from the same noise. Judges take turns in one process of one thread, and the least of a judge's
rounds counts: other programs only add to it. Training on the pairs costs the same for all, and is not in here.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, cast

import torch

from diffalign.config.schema import Config, load_config, packaged_config
from diffalign.sources.stream import RoundPairs
from diffalign.training.build import Run, build
from diffalign.training.processes import make_accelerator
from diffalign.training.run import environment

JUDGES = ("world", "world-step-aware", "world-latent-judge")
ROUNDS = 3  # of each judge, after one that is not timed


def sampling_run(judge: str, out: Path) -> Run:
    """A run whose policy is the base, with a judge; nothing is trained."""
    changes = [f"output_dir={out}", f"source.scorer={judge}", "training.report_to=none"]
    config = load_config(packaged_config("world/spo.yaml"), changes)
    assert isinstance(config, Config)
    return build(config, make_accelerator(config))


def one_round(run: Run, number: int) -> tuple[float, int, int]:
    """CPU seconds of a round, images through the policy, and pairs."""
    source, before = cast("RoundPairs", run.source), run.networks.image_forwards
    places, begun = source.places(number), time.process_time()
    rollout = source.roll(number, places)
    seconds = time.process_time() - begun
    pairs = 0 if rollout.records is None else len(rollout.records.prompt)
    return seconds, run.networks.image_forwards - before, pairs


def main() -> None:
    """Command line of this module."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--also", nargs="*", default=[], metavar="JUDGE", help="other judges, as `source.scorer` names them")
    a = p.parse_args()
    torch.set_num_threads(1)
    runs = {judge: sampling_run(judge, a.out / f"run{i}") for i, judge in enumerate((*JUDGES, *a.also))}
    found: dict[str, list[tuple[float, int, int]]] = {judge: [] for judge in runs}
    for number in range(ROUNDS + 1):
        for judge, run in runs.items():
            found[judge].append(one_round(run, number))
    rows = [
        {
            "judge": judge,
            "seconds": [seconds for seconds, _, _ in rounds[1:]],
            "policy_images": rounds[-1][1],
            "pairs": [pairs for _, _, pairs in rounds[1:]],
        }
        for judge, rounds in found.items()
    ]
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "result.json").write_text(json.dumps({"rows": rows, "environment": environment()}, indent=2) + "\n")
    (a.out / "table.md").write_text(table(rows))
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each judge; seconds also as shares of the first two judges', which are SPO's."""
    (first, one), (second, two) = ((row["judge"], min(row["seconds"])) for row in rows[:2])
    heads = ("judge", "CPU s a round", f"of `{first}`", f"of `{second}`", "images through the policy", "pairs")
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        least, pairs = min(row["seconds"]), " ".join(map(str, row["pairs"]))
        shares = f"{least:.2f} | {least / one:.2f} | {least / two:.2f}"
        lines.append(f"| `{row['judge']}` | {shares} | {row['policy_images']:,} | {pairs} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
