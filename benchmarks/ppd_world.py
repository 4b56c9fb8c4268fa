"""PPD on the embedded world: one network, two users of opposite taste, and mixtures of both.

    python benchmarks/ppd_world.py --out runs/ppd                      # everything: three training seeds
    python benchmarks/ppd_world.py --out runs/ppd --only "dpo, users unknown" --seeds 0 1 2
    python benchmarks/ppd_world.py --out runs/ppd --table              # the table of the results so far

A setting is trained once for each seed and compared with the base on the same prompts and initial noise, once for each
user: dR under bold's reward, dR under quiet's, and the change of what they disagree about, vividness + relative size.
"dpo, users unknown" is full fine-tuning on the same pairs without users. Finished runs and settings are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image
from torch import Tensor
from world_lines import finished, line_file, name_of, train

from diffalign.config.schema import load_config, packaged_config
from diffalign.evaluation.evaluate import evaluate
from diffalign.evaluation.recipe import Tuned
from diffalign.evaluation.sampling import Sampling
from diffalign.evaluation.scoring import Scoring
from diffalign.training.run import environment
from diffalign.world import base_path, oracle
from diffalign.world.captions import prompts
from diffalign.world.scorer import read_images
from diffalign.world.users import world_user

PAIRS = "data.path=assets/world/pairs/tastes.parquet"
SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ppd": ("ppd", ()),
    "dpo, users unknown": ("dpo", (PAIRS,)),
}
TASTES = (1.0, 0.5, 0.0, -0.5, -1.0)  # bold, three users nobody was trained on, quiet
SCORERS = ("world-bold", "world-quiet")
LIKING = "liking"
HEAD = ("setting", "user", "taste", "dR bold", "dR quiet", "vividness + size", "by seed", "accuracy", "diversity")


class Liking:
    """Vividness + relative size: what bold likes and quiet does not; in [0, 2]."""

    name = LIKING

    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """What the oracle reads off the pictures, [n]."""
        reading, _ = read_images(images, texts)
        return reading.vividness + oracle.size(reading)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this script."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="training seeds")
    p.add_argument(
        "--split", choices=("train", "heldout", "final"), default="heldout", help="prompts of the evaluation"
    )
    p.add_argument("--pictures", type=int, default=12, help="of each prompt and user")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of the ppd config, to try them")
    p.add_argument("--table", action="store_true", help="train nothing; write the table of the finished lines")
    a = p.parse_args(arguments)
    torch.set_num_threads(1)
    for setting in () if a.table else a.only:
        changes = a.set if setting == "ppd" else []
        trained, file = described(setting, changes), line_file(a.out, "base", setting)
        if finished(file, trained, len(a.seeds)):
            print(f"{setting}: done before", flush=True)
            continue
        runs = [a.out / "runs" / name_of(setting) / f"seed{seed}" for seed in a.seeds]
        for seed, run in zip(a.seeds, runs, strict=True):
            train({**trained, "seed": seed}, run, f"{setting}, seed {seed}")
        line = measured(setting, trained, runs, a.seeds, a.split, a.pictures)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(line, indent=2) + "\n")
    write_table(a.out)


def described(setting: str, changes: Sequence[str]) -> dict[str, Any]:
    """The resolved config of a setting but for its folder and seed."""
    name, own = SETTINGS[setting]
    tree = load_config(packaged_config(f"world/{name}.yaml"), own, [*changes, "training.report_to=none"]).resolved()
    return {key: value for key, value in tree.items() if key not in ("output_dir", "overwrite_output_dir", "seed")}


def measured(
    setting: str, trained: dict[str, Any], runs: Sequence[Path], seeds: Sequence[int], split: str, pictures: int
) -> dict[str, Any]:
    """All users of a setting, each against the base on the same prompts and noise; with its runs' last metrics."""
    known = trained["tuning"]["method"] == "user_attention"
    users = [world_user(taste) for taste in TASTES] if known else [None]
    lines = []
    for user in users:
        result = evaluate(
            str(base_path()),
            {setting: [Tuned(run, user=None if user is None else user.embedding) for run in runs]},
            prompts(split),
            range(pictures),
            scorers=Scoring([*SCORERS, Liking()], faithfulness="world-accuracy"),
            sampling=Sampling(num_inference_steps=20, guidance_scale=5.0, device="cpu"),
            out_dir=runs[0].parent / f"evaluation-{split}",
        )
        found = result.models[0]
        lines.append(
            {
                "user": "anybody" if user is None else user.name,
                "taste": None if user is None else user.taste,
                "gain": {name: [s.gain.value, s.gain.low, s.gain.high] for name, s in found.scores.items()},
                "gain_by_seed": found.run_gains,
                "win_rate": {
                    name: [s.win_rate.value, s.win_rate.low, s.win_rate.high] for name, s in found.scores.items()
                },
                "base": {name: s.base for name, s in found.scores.items()},
                "accuracy": [found.faithfulness.base, found.faithfulness.tuned] if found.faithfulness else None,
                "diversity": found.diversity.value if found.diversity else None,
            }
        )
        print("\n".join(map(row, [(setting, lines[-1])])), flush=True)
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in runs]
    return {
        "setting": setting,
        "trained": trained,
        "seeds": len(runs),
        "seed_values": list(seeds),
        "split": split,
        "pictures": pictures,
        "users": lines,
        "monotone_by_seed": monotone(lines) if known else None,
        "last_metrics": last,
        "training_seconds": [float((run / "seconds").read_text()) for run in runs],
        "environment": environment(),
    }


def monotone(lines: Sequence[dict[str, Any]]) -> list[bool]:
    """For each training seed: does vividness + size fall from each user to the next, from bold to quiet?"""
    by_seed = zip(*(line["gain_by_seed"][LIKING] for line in lines), strict=True)
    return [all(a > b for a, b in pairwise(gains)) for gains in by_seed]


def write_table(out: Path) -> None:
    """OUT/result.json and OUT/table.md of the finished settings; prints the table."""
    files = [line_file(out, "base", setting) for setting in SETTINGS]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    (out / "result.json").write_text(json.dumps(found, indent=2) + "\n")
    rows = [row((line["setting"], user)) for line in found for user in line["users"]]
    text = "\n".join([f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD), *rows]) + "\n"
    (out / "table.md").write_text(text)
    print(text)


def row(line: tuple[str, dict[str, Any]]) -> str:
    """One user of a setting; brackets are 95 % intervals, clustered by prompt, runs resampled."""
    setting, user = line

    def interval(name: str) -> str:
        value, low, high = user["gain"][name]
        return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"

    cells = (
        setting,
        user["user"],
        "-" if user["taste"] is None else f"{user['taste']:+.1f}",
        interval(SCORERS[0]),
        interval(SCORERS[1]),
        interval(LIKING),
        " ".join(f"{gain:+.3f}" for gain in user["gain_by_seed"][LIKING]),
        " → ".join(f"{value:.3f}" for value in user["accuracy"] or ()),
        "-" if user["diversity"] is None else f"{user['diversity']:.2f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
