"""The sweep: learning rate and one scale of each entry, on held-out prompts that the leaderboard does not use.

1. Every rate of the entry is tried on the first seed, with the scale of its config.
2. The other scales are tried at the rate of the best trial so far, on the first seed.
3. The best few of these settings (`Entry.finalists`) are tried on the other seeds. Where a seed of each violates a
   guard, the next best settings follow, one at a time and at most FURTHER of them, until no seed of one does.
4. Chosen is the largest mean gain among finalists of which no seed violates a guard; among all where each does.

An entry with one finalist is decided on the first seed alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.arena.board import gain, leaderboard_row
from diffalign.arena.entries import SWEEP, Entry, Protocol, config_of
from diffalign.arena.folder import ArenaFolder
from diffalign.arena.jobs import FinishedJob, Job, run_jobs
from diffalign.training.run import environment

PREFERENCE = "world"  # the other one is tuned for by nobody
RATE = "training.learning_rate"
FURTHER = 3  # settings beyond the finalists that are tried while each violates a guard

Trial = dict[str, Any]
Asked = tuple[Entry, dict[str, Any], int]  # settings of an entry, and the training seed


def sweep_settings(
    arena: ArenaFolder,
    entries: Sequence[Entry],
    command: str,
    protocol: Protocol = SWEEP,
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Tries and chooses as the head of this file says; returns all trials and what was chosen.

    known: what an earlier sweep returned. Its trials of the same protocol stay, and are not trained again; each
    keeps the commit that it was trained at.
    """
    for entry in entries:  # a setting that no config can have is an error now, not after an hour
        for value in entry.scales:
            config_of(entry, protocol, PREFERENCE, 0, arena.data(entry, PREFERENCE), {str(entry.scale): value})
    of_protocol = {
        "steps": protocol.steps, "seeds": list(protocol.seeds), "split": protocol.split,
        "pictures": protocol.pictures, "preference": PREFERENCE,
    }  # fmt: skip
    trials = {entry.name: _comparable(known, entry.name, of_protocol) for entry in entries}
    first, *others = protocol.seeds

    def of_first(entry: Entry) -> list[Trial]:
        return [trial for trial in trials[entry.name] if trial["seed"] == first]

    def stage(asked: Sequence[Asked], desc: str) -> None:
        new = [one for one in asked if not any(_is_of(one, trial) for trial in trials[one[0].name])]
        for (entry, _, _), trial in zip(new, _tried(arena, protocol, new, desc), strict=True):
            trials[entry.name].append(trial)

    stage([(entry, {RATE: rate}, first) for entry in entries for rate in entry.rates], "sweep: rates")
    rates = {entry.name: finalists(of_first(entry), 1)[0][RATE] for entry in entries}
    stage(
        [
            (entry, {RATE: rates[entry.name], entry.scale: value}, first)
            for entry in entries
            if entry.scale is not None
            for value in entry.scales
        ],
        "sweep: scales",
    )
    repeated = [entry for entry in entries if entry.finalists > 1]
    for further in range(FURTHER + 1):
        last = [
            (entry, settings, seed)
            for entry in repeated
            if further == 0 or not _silent(trials[entry.name], chosen(trials[entry.name]))
            for settings in finalists(of_first(entry), entry.finalists + further)
            for seed in others
        ]
        stage(last, "sweep: other seeds")
    where = environment()
    return {
        "command": command,
        "environment": where,
        "protocol": of_protocol,
        "entries": {
            name: {"git_commit": where["git_commit"], "chosen": chosen(tried), "trials": tried}
            for name, tried in trials.items()
        },
    }


def finalists(trials: Sequence[Trial], number: int) -> list[dict[str, Any]]:
    """The settings with the largest gains, the best first; those that violate a guard come last."""
    return [trial["settings"] for trial in sorted(trials, key=_order, reverse=True)[:number]]


def chosen(trials: Sequence[Trial]) -> dict[str, Any]:
    """The largest mean gain among the settings tried on most seeds; those of which a seed violates a guard are last."""
    groups = [[trial for trial in trials if trial["settings"] == one["settings"]] for one in trials]
    most = max(len(group) for group in groups)

    def mean_order(group: list[Trial]) -> tuple[bool, float]:
        orders = [_order(trial) for trial in group]
        return all(silent for silent, _ in orders), sum(value for _, value in orders) / len(orders)

    settings: dict[str, Any] = max((group for group in groups if len(group) == most), key=mean_order)[0]["settings"]
    return settings


def save_sweep(found: dict[str, Any], file: Path) -> None:
    """Writes what was found; earlier entries that were not tried now stay, with their own commit."""
    if file.is_file():
        earlier = json.loads(file.read_text())
        commit = {"git_commit": earlier["environment"]["git_commit"]}
        kept = {name: commit | entry for name, entry in earlier["entries"].items()}
        found = {**found, "entries": kept | found["entries"]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


def _silent(trials: Sequence[Trial], settings: dict[str, Any]) -> bool:
    """Whether no trial of these settings failed or violated a guard."""
    return all(_order(trial)[0] for trial in trials if trial["settings"] == settings)


def _order(trial: Trial) -> tuple[bool, float]:
    """Trials without a guard before the others, then by gain; a run that failed is last."""
    failed = trial["gain"] is None
    return not failed and not trial["guards"], float("-inf") if failed else float(trial["gain"])


def _comparable(known: dict[str, Any] | None, name: str, protocol: dict[str, Any]) -> list[Trial]:
    """An entry's trials of an earlier sweep, if all but its seeds was as it is now."""
    if known is None or name not in known["entries"]:
        return []
    same = all(known["protocol"][key] == protocol[key] for key in protocol if key != "seeds")
    return list(known["entries"][name]["trials"]) if same else []


def _is_of(asked: Asked, trial: Trial) -> bool:
    return (trial["settings"], trial["seed"]) == asked[1:]


def _tried(arena: ArenaFolder, protocol: Protocol, asked: Sequence[Asked], desc: str) -> list[Trial]:
    """A trial for each that is asked for, in order."""
    base = arena.base(protocol)
    jobs = [
        Job(
            arena.folder / "sweep" / entry.name / _folder(tuned) / f"seed{seed}",
            config_of(entry, protocol, PREFERENCE, seed, arena.data(entry, PREFERENCE), tuned),
            base.prompts,
            base.seeds,
        )
        for entry, tuned, seed in asked
    ]
    drawn, *runs = run_jobs([base, *jobs], arena.workers, desc)
    return [_trial(one, run, drawn) for one, run in zip(asked, runs, strict=True)]


def _folder(tuned: dict[str, Any]) -> str:
    return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in tuned.values())


def _trial(asked: Asked, run: FinishedJob, base: FinishedJob) -> Trial:
    entry, tuned, seed = asked
    row = leaderboard_row(entry, [run], base, PREFERENCE)
    failed = row["failed"] is not None
    return {
        "settings": tuned,
        "seed": seed,
        "git_commit": run.commit,
        "gain": None if failed else gain(row, PREFERENCE),
        "accuracy_change": None if failed else row["accuracy"]["change"][0],
        "diversity": None if failed else row["diversity"][0],
        "guards": [] if failed else row["guards"],
        "failed": row["failed"],
    }
