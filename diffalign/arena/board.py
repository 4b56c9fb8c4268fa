"""The leaderboard: every entry's gain over the base, as a record, as JSON and as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.arena.entries import PREFERENCES, Entry
from diffalign.arena.jobs import FinishedJob
from diffalign.evaluation.compare import compare
from diffalign.evaluation.scoring import Scoring
from diffalign.evaluation.stats import Paired
from diffalign.objectives import OBJECTIVES
from diffalign.sources import SOURCES

FAITHFUL = "world-accuracy"
LEAST_ACCURACY = -0.03  # change against the base below which the faithfulness guard is violated
LEAST_DIVERSITY = 0.85  # share of the base's below which the diversity guard is violated
CURVES = ("loss", "implicit_acc", "rewards/chosen", "rewards/rejected", "grad_norm")  # of the first seed's run

Row = dict[str, Any]


def leaderboard_row(entry: Entry, runs: Sequence[FinishedJob], base: FinishedJob, preference: str) -> Row:
    """An entry's line: gain in the preference's reward over the base on the same prompts and starting noise.

    Intervals are at 95 %, over prompts and training runs. Where a run failed the line says why and has no figures.
    """
    row: Row = {
        "name": entry.name,
        "paper": paper_of(entry, runs[0]),
        "control": entry.control,
        "online": runs[0].config["source"] is not None,
        "config": _anywhere(runs[0].config),
        "runs": len(runs),
        "steps": [run.steps for run in runs],
        "unet_forwards": [run.forwards for run in runs],
        "cpu_seconds": [round(run.seconds, 1) for run in runs],
        "commits": sorted({str(run.commit) for run in runs}),
        "curves": _curves(runs[0]),
        "failed": next((run.failed for run in runs if run.failed), None),
    }
    if row["failed"]:
        return row
    scorers = [preference, *(other for other in PREFERENCES if other != preference)]
    result, _ = compare(base.pictures, {entry.name: [run.pictures for run in runs]}, Scoring(scorers, FAITHFUL))
    (found,) = result.models
    rewards = {name: _paired(paired) for name, paired in found.scores.items()}
    accuracy, diversity = found.faithfulness, found.diversity
    assert accuracy is not None
    assert diversity is not None  # several seeds of each prompt
    return row | {
        "rewards": rewards,
        "gain_by_run": found.run_gains,
        "accuracy": {"base": accuracy.base, "tuned": accuracy.tuned, "change": _limits(accuracy.gain)},
        "diversity": _limits(diversity),
        "guards": guards(accuracy.gain.value, diversity.value),
    }


def guards(accuracy_change: float, diversity: float) -> list[str]:
    """The guards that are violated: what a gain has cost."""
    active = []
    if accuracy_change < LEAST_ACCURACY:
        active.append("faithfulness")
    if diversity < LEAST_DIVERSITY:
        active.append("diversity")
    return active


def ranked(rows: Sequence[Row], preference: str) -> list[Row]:
    """By gain, the largest first; runs that failed last."""
    return sorted(rows, key=lambda row: -gain(row, preference))


def gain(row: Row, preference: str) -> float:
    """dR of a line; minus infinity where a run failed."""
    return float("-inf") if row["failed"] else float(row["rewards"][preference]["gain"][0])


def leaderboard_table(rows: Sequence[Row], preference: str) -> str:
    """The lines in the order of `ranked` as a Markdown table; brackets are 95 % intervals."""
    (other,) = (name for name in PREFERENCES if name != preference)
    head = ("", "dR", "win rate", "accuracy", "diversity", f"dR {other}", "steps", "UNet forwards", "CPU s")
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in ranked(rows, preference):
        name = f"*{row['name']}* (control)" if row["control"] else f"`{row['name']}`"
        cost = (_mean(row["steps"], "d"), _mean(row["unet_forwards"], ",d"), _mean(row["cpu_seconds"], "d"))
        if row["failed"]:
            cells = (name, f"failed: {row['failed']}", "", "", "", "", *cost)
        else:
            mine = row["rewards"][preference]
            cells = (
                name,
                interval(mine["gain"], "+.3f"),
                interval(mine["win_rate"], ".2f"),
                _marked(interval(row["accuracy"]["change"], "+.3f"), "faithfulness" in row["guards"]),
                _marked(interval(row["diversity"], ".2f"), "diversity" in row["guards"]),
                interval(row["rewards"][other]["gain"], "+.3f"),
                *cost,
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def interval(values: Sequence[float], form: str) -> str:
    """Value and limits in one style."""
    value, low, high = (f"{number:z{form}}" if form[0] != "+" else f"{number:+z{form[1:]}}" for number in values)
    return f"{value} [{low}, {high}]"


def paper_of(entry: Entry, run: FinishedJob) -> str:
    """What an entry is: its paper; a source's where it is known by the source, and why a control is there."""
    if entry.control:
        return entry.control
    if entry.name in OBJECTIVES:
        return OBJECTIVES[entry.name].paper
    return SOURCES[run.config["source"]["name"]].paper


def _anywhere(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the arena's pairs named as they are on any machine."""
    return {**config, "data": {**config["data"], "path": f"pairs/{Path(config['data']['path']).name}"}}


def _curves(run: FinishedJob) -> dict[str, list[float | None]]:
    """The curves of a run that the page shows, by metric; the step of each value under `step`."""
    present = [name for name in CURVES if any(name in line for line in run.metrics)]
    return {name: [_short(line.get(name)) for line in run.metrics] for name in ("step", *present)}


def _short(value: float | None) -> float | None:
    """Six digits: more cannot be seen in a curve."""
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")


def _paired(paired: Paired) -> dict[str, Any]:
    return {
        "base": paired.base,
        "tuned": paired.tuned,
        "gain": _limits(paired.gain),
        "win_rate": _limits(paired.win_rate),
        "win_tie_loss": [paired.wins, paired.ties, paired.losses],
        "tie": paired.tie,
    }


def _limits(estimate: Any) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


def _mean(values: Sequence[float], form: str) -> str:
    return f"{round(sum(values) / len(values)):{form}}"


def _marked(text: str, marked: bool) -> str:
    return f"**{text}**" if marked else text
