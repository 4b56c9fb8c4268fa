"""The sweep: learning rate and one scale of each entry, on held-out prompts that the leaderboard does not use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.arena.board import gain, leaderboard_row
from diffalign.arena.entries import RATES, SWEEP, Entry, Protocol, config_of
from diffalign.arena.folder import ArenaFolder
from diffalign.arena.jobs import Job, run_jobs
from diffalign.training.run import environment

PREFERENCE = "world"  # the other one is tuned for by nobody
RATE = "training.learning_rate"


def sweep_settings(
    arena: ArenaFolder, entries: Sequence[Entry], command: str, protocol: Protocol = SWEEP
) -> dict[str, Any]:
    """Tries every learning rate, then the other scales at the best of them; returns what was found and chosen.

    Chosen is the largest gain among trials that violate no guard; among all where each does.
    """
    for entry in entries:  # a setting that no config can have is an error now, not after an hour
        for value in entry.scales:
            config_of(entry, protocol, PREFERENCE, 0, arena.pairs(PREFERENCE), {str(entry.scale): value})
    trials: dict[str, list[dict[str, Any]]] = {entry.name: [] for entry in entries}
    _try(arena, protocol, [(entry, {RATE: rate}) for entry in entries for rate in RATES], trials, "sweep: rates")
    further = [
        (entry, {RATE: best(trials[entry.name])["settings"][RATE], entry.scale: value})
        for entry in entries
        if entry.scale is not None
        for value in entry.scales
    ]
    _try(arena, protocol, further, trials, "sweep: scales")
    where = environment()
    return {
        "command": command,
        "environment": where,
        "protocol": {"steps": protocol.steps, "seeds": protocol.seeds, "split": protocol.split,
                     "pictures": protocol.pictures, "preference": PREFERENCE},
        "entries": {
            name: {"git_commit": where["git_commit"], "chosen": best(tried)["settings"], "trials": tried}
            for name, tried in trials.items()
        },
    }  # fmt: skip


def best(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The trial with the largest gain, of those that violate no guard where there are any."""
    return max(trials, key=lambda trial: (trial["gain"] is not None and not trial["guards"], _order(trial)))


def save_sweep(found: dict[str, Any], file: Path) -> None:
    """Writes what was found; earlier entries that were not tried now stay, with their own commit."""
    if file.is_file():
        earlier = json.loads(file.read_text())
        commit = {"git_commit": earlier["environment"]["git_commit"]}
        kept = {name: commit | entry for name, entry in earlier["entries"].items()}
        found = {**found, "entries": kept | found["entries"]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


def _try(
    arena: ArenaFolder,
    protocol: Protocol,
    settings: Sequence[tuple[Entry, dict[str, Any]]],
    trials: dict[str, list[dict[str, Any]]],
    desc: str,
) -> None:
    base = arena.base(protocol)
    jobs = [
        Job(
            arena.folder / "sweep" / entry.name / "-".join(f"{value:g}" if isinstance(value, float) else str(value)
                                                           for value in tuned.values()),
            config_of(entry, protocol, PREFERENCE, protocol.seeds[0], arena.pairs(PREFERENCE, entry.shuffled), tuned),
            base.prompts,
            base.seeds,
        )
        for entry, tuned in settings
    ]  # fmt: skip
    drawn, *runs = run_jobs([base, *jobs], arena.workers, desc)
    for (entry, tuned), run in zip(settings, runs, strict=True):
        row = leaderboard_row(entry, [run], drawn, PREFERENCE)
        failed = row["failed"] is not None
        trials[entry.name].append(
            {
                "settings": tuned,
                "gain": None if failed else gain(row, PREFERENCE),
                "accuracy_change": None if failed else row["accuracy"]["change"][0],
                "diversity": None if failed else row["diversity"][0],
                "guards": [] if failed else row["guards"],
                "failed": row["failed"],
            }
        )


def _order(trial: dict[str, Any]) -> float:
    return float("-inf") if trial["gain"] is None else float(trial["gain"])
