"""Methods that make their pairs while training, on the embedded world: packaged configs × training seeds.

    python benchmarks/online_world.py --out runs/online                        # everything
    python benchmarks/online_world.py --out runs/online --only spo raft --seeds 0 1 2
    python benchmarks/online_world.py --out runs/online --table                # the table of what is there

A line is a config of training_configs/world, changed as SETTINGS says, trained once for each seed and compared with
the base on held-out prompts, as in `inversion_world.py`. Several processes may share OUT as long as their lines differ.
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

# Name of a line -> the packaged config and what is changed in it.
SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dpo, offline pairs": ("dpo", ()),
    "sft, offline winners": ("sft", ()),
    "spo, judge: oracle": ("spo", ()),
    "spo, judge: step-aware": ("spo", ("source.scorer=world-step-aware", "source.threshold=0.05")),
    "seppo": ("seppo", ()),
    "spin": ("spin", ()),
    "raft": ("raft", ()),
    "online dpo": ("online_dpo", ()),
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
            train({**trained, "seed": seed}, run, f"{setting}, seed {seed}")
        write_line(file, measured(base_path(), "base", setting, trained, runs, split=a.split, pictures=a.pictures))
    write_table(a.out, list(SETTINGS))


def described(setting: str) -> dict[str, Any]:
    """The resolved config of a line but for its folder and seed; paths of what is packaged stay relative."""
    name, changes = SETTINGS[setting]
    tree = load_config(packaged_config(f"world/{name}.yaml"), [*changes, "training.report_to=none"]).resolved()
    return {key: value for key, value in tree.items() if key not in ("output_dir", "overwrite_output_dir", "seed")}


if __name__ == "__main__":
    main()
