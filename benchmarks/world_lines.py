"""Lines of a table on the embedded world: a setting trained once for each seed, against the model it started from.

What the scripts beside this file share. A finished run is a folder with a file `seconds`, a finished line a file in
OUT/lines; neither is done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.config import parse_config
from diffalign.evaluation.evaluate import evaluate
from diffalign.training.run import environment, run_training
from diffalign.world.captions import prompts

SCORERS = ("world", "world-size")
HEAD = ("start", "setting", "dR", "dR by seed", "dR size", "win rate", "accuracy", "diversity", "s/step")


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
        scorers=SCORERS,
        faithfulness="world-accuracy",
        steps=20,
        guidance=5.0,
        out_dir=runs[0].parent / "evaluation",
        grid_rows=8,
        progress=False,
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
