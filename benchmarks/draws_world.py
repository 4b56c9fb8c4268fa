"""How many draws a pair needs: Diffusion-DPO on the embedded world with K kept draws of (t, ε) a pair, K × seeds.

    python benchmarks/draws_world.py --out runs/draws                          # everything
    python benchmarks/draws_world.py --out runs/draws --only "all" "K: 1"
    python benchmarks/draws_world.py --out runs/draws --table                  # the table of what is there

A line is training_configs/world/dpo.yaml with `data.draws_per_pair` (and fewer pairs) as SETTINGS says, trained once
for each seed and compared with the base on held-out prompts. Runs with kept draws read the reference's errors from a
cache in OUT: their numbers are those of runs without it to the bit (tests/training/test_reference_errors.py).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from world_lines import finished, line_file, measured, name_of, train, write_line, write_table

from diffalign.config import load_config, packaged_config
from diffalign.world import base_path

# Name of a line -> what it changes. 300 steps of 32 pairs visit each of 1,024 pairs 9.4 times, each of 256 37.5 times.
SETTINGS: dict[str, dict[str, int]] = {
    "all": {},
    **{f"K: {k}": {"draws_per_pair": k} for k in (1, 2, 4, 8)},
    "256 pairs, all": {"max_pairs": 256},
    **{f"256 pairs, K: {k}": {"max_pairs": 256, "draws_per_pair": k} for k in (1, 4, 16)},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this script."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="training seeds")
    p.add_argument("--split", choices=("heldout", "final"), default="heldout", help="prompts of the evaluation")
    p.add_argument("--pictures", type=int, default=12, help="of each prompt and model")
    p.add_argument("--table", action="store_true", help="train nothing; write the table of the finished lines")
    a = p.parse_args(arguments)
    torch.set_num_threads(1)
    for setting in () if a.table else a.only:
        trained, file = described(setting), line_file(a.out, "base", setting)
        if finished(file, trained, len(a.seeds)):
            print(f"{setting}: done before", flush=True)
            continue
        runs = [a.out / "runs" / name_of(setting) / f"seed{seed}" for seed in a.seeds]
        for seed, run in zip(a.seeds, runs, strict=True):
            train({**trained, "data": cached(trained["data"], a.out), "seed": seed}, run, f"{setting}, seed {seed}")
        write_line(file, measured(base_path(), "base", setting, trained, runs, split=a.split, pictures=a.pictures))
    write_table(a.out, list(SETTINGS))


def described(setting: str) -> dict[str, Any]:
    """The resolved config of a line but for its folder and seed; paths of what is packaged stay relative."""
    changes = [f"data.{key}={value}" for key, value in SETTINGS[setting].items()]
    tree = load_config(packaged_config("world/dpo.yaml"), [*changes, "training.report_to=none"]).resolved()
    return {key: value for key, value in tree.items() if key not in ("output_dir", "overwrite_output_dir", "seed")}


def cached(data: dict[str, Any], out: Path) -> dict[str, Any]:
    """The data of a line with its encode cache, and the reference's errors where draws repeat."""
    folder = out / "cache" / str(data["max_pairs"] or "all")
    return {**data, "cache_dir": str(folder), "cache_reference_errors": data["draws_per_pair"] is not None}


if __name__ == "__main__":
    main()
