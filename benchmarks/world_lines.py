"""Lines of a table on the embedded world: a setting trained once for each seed, compared with the model it starts from.

The scripts beside this file share this code. A finished run is a folder with a file `seconds`, a finished line is a
file in OUT/lines; neither is repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffalign.config.schema import load_config, packaged_config, parse_config
from diffalign.evaluation.evaluate import evaluate
from diffalign.evaluation.sampling import Sampling
from diffalign.evaluation.scoring import Scoring
from diffalign.training.run import environment, run_training
from diffalign.world import base_path
from diffalign.world.captions import prompts

SCORERS = ("world", "world-size")
HEAD = ("start", "setting", "dR", "dR by seed", "dR size", "win rate", "accuracy", "diversity", "s/step")


def main(
    doc: str | None,
    settings: Sequence[str],
    described: Callable[[str], dict[str, Any]],
    arguments: Sequence[str] | None,
    placed: Callable[[dict[str, Any], Path], dict[str, Any]] = lambda trained, out: trained,
) -> None:
    """Command line of a script whose lines all start from the base: every setting with every seed, then the table.

    `described` gives the config of a setting without folder and seed; `placed` puts folders below OUT into it.
    """
    p = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--only", nargs="+", choices=settings, default=list(settings), metavar="SETTING")
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
            train({**placed(trained, a.out), "seed": seed}, run, f"{setting}, seed {seed}")
        write_line(file, measured(base_path(), "base", setting, trained, runs, split=a.split, pictures=a.pictures))
    write_table(a.out, list(settings))


def packaged(name: str, changes: Sequence[str]) -> dict[str, Any]:
    """A packaged world config but for its folder and seed; paths of what is packaged stay relative."""
    tree = load_config(packaged_config(f"world/{name}.yaml"), changes, ["training.report_to=none"]).resolved()
    return {key: value for key, value in tree.items() if key not in ("output_dir", "overwrite_output_dir", "seed")}


def train(config: dict[str, Any], out: Path, where: str) -> None:
    """One run of a config into `out`, unless it ended there before; an unfinished one is started again."""
    if (out / "seconds").is_file():
        return
    begun = time.perf_counter()
    run_training(parse_config({**config, "output_dir": str(out), "overwrite_output_dir": True}, where=where))
    (out / "seconds").write_text(f"{time.perf_counter() - begun:.1f}\n")


def measured(
    model: Path, start: str, setting: str, trained: dict[str, Any], runs: Sequence[Path], *, split: str, pictures: int
) -> dict[str, Any]:
    """The line of some runs that differ in their seed: gains over `model` on the same prompts and starting noise.

    trained: what the setting is, plain values; a line that was made of other values is not taken for this one.
    """
    result = evaluate(
        str(model),
        {setting: [str(run) for run in runs]},
        prompts(split),
        range(pictures),
        scorers=Scoring(SCORERS, faithfulness="world-accuracy"),
        sampling=Sampling(num_inference_steps=20, guidance_scale=5.0, device="cpu"),
        out_dir=runs[0].parent / "evaluation",
    )
    found = result.models[0]

    def interval(e: Any) -> list[float]:
        return [e.value, e.low, e.high]

    return {
        "start": start,
        "setting": setting,
        "trained": trained,
        "seeds": len(runs),
        "steps": [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] for run in runs],
        "split": split,
        "pictures": pictures,
        "gain": {name: interval(paired.gain) for name, paired in found.scores.items()},
        "gain_by_seed": found.run_gains,
        "win_rate": interval(found.scores[SCORERS[0]].win_rate),
        "accuracy": [found.faithfulness.base, found.faithfulness.tuned] if found.faithfulness else None,
        "diversity": interval(found.diversity) if found.diversity else None,
        "last_metrics": [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in runs],
        "training_seconds": [float((run / "seconds").read_text()) for run in runs],
        "environment": environment(),
    }


def name_of(setting: str) -> str:
    """The setting as part of a path."""
    return setting.replace(", ", "-").replace(": ", "_").replace(" ", "_")


def line_file(out: Path, start: str, setting: str) -> Path:
    """Where a finished line is kept."""
    return out / "lines" / f"{start}-{name_of(setting)}.json"


def finished(file: Path, trained: dict[str, Any], seeds: int) -> bool:
    """Whether a line is there, of these settings and as many seeds. Ends the program where it is of other settings."""
    if not file.exists():
        return False
    line = json.loads(file.read_text())
    if line["trained"] != trained:
        raise SystemExit(f"{file} is of {line['trained']}, and the setting is now {trained}; name another --out")
    return bool(line["seeds"] == seeds)


def write_line(file: Path, line: dict[str, Any]) -> None:
    """The line appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(line, indent=2) + "\n")
    partial.replace(file)
    print(row(line), flush=True)


def write_table(out: Path, order: Sequence[str]) -> None:
    """OUT/result.json and OUT/table.md of all finished lines, by start, then in the order given; prints the table."""
    lines = [json.loads(file.read_text()) for file in sorted((out / "lines").glob("*.json"))]
    place = {name: i for i, name in enumerate(order)}
    lines.sort(key=lambda line: (line["start"], place.get(line["setting"], len(place))))
    (out / "result.json").write_text(json.dumps(lines, indent=2) + "\n")
    text = "\n".join([f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD), *map(row, lines)]) + "\n"
    (out / "table.md").write_text(text)
    print(text)


def row(line: dict[str, Any]) -> str:
    """One line of the table; brackets are 95 % intervals, clustered by prompt, runs resampled."""

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
        f"{sum(line['training_seconds']) / sum(line['steps']):.2f}",
    )
    return f"| {' | '.join(cells)} |"
