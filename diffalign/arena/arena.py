"""One arena from start to end: train, generate, measure, and write the leaderboard with its page and figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.arena.board import Row, leaderboard_row, leaderboard_table, ranked
from diffalign.arena.entries import BATCH, PREFERENCES, Entry, Protocol, at_equal_forwards, config_of
from diffalign.arena.folder import ArenaFolder
from diffalign.arena.jobs import FinishedJob, Job, run_jobs
from diffalign.arena.page import image_strip, page
from diffalign.arena.plots import leaderboard
from diffalign.errors import DiffalignError
from diffalign.training.run import environment

FIRST, SECOND = PREFERENCES


def run_arena(
    arena: ArenaFolder,
    entries: Sequence[Entry],
    protocol: Protocol,
    tuned: dict[str, dict[str, Any]],
    command: str,
    kept: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains every entry and returns the record of what was found; writes it to the arena's folder.

    result.json   the record            leaderboard.md    its tables
    arena.html    one page of it all    leaderboard.png   the figure of the README

    tuned: settings by entry, as `entries.tuned_settings` gives them. Finished runs in the folder are used again.
    kept: the record of an earlier arena of this protocol. Lines of entries that are not among `entries` are taken from
    it as they are, with their settings, commits and intervals, and marked as `kept`.

    Raises DiffalignError where the protocol of `kept` is another one.
    """
    board = _Board(arena, entries, protocol, tuned)
    found: dict[str, Any] = {
        "command": command,
        "environment": environment(),
        "protocol": {
            "steps": protocol.steps,
            "pairs_per_step": BATCH,
            "seeds": list(protocol.seeds),
            "forwards_seeds": list(protocol.forwards_seeds),
            "second_seeds": list(protocol.second_seeds),
            "split": protocol.split,
            "prompts": list(board.base.prompts),
            "pictures_per_prompt": protocol.pictures,
            "unet_forwards": protocol.unet_forwards,
        },
        "views": [],
    }
    earlier = {} if kept is None else _kept(kept, found["protocol"], {entry.name for entry in entries})
    if kept is not None:
        found["kept"] = {"environment": kept["environment"]}

    def add(rows: list[Row], preference: str, budget: str) -> None:
        """Adds a view to the record and writes it: hours may pass before the next."""
        rows = [*rows, *earlier.get((preference, budget), [])]
        found["views"].append({"preference": preference, "budget": budget, "rows": ranked(rows, preference)})
        _write(arena.folder, found, {name: image_strip(done) for name, done in board.shown.items()})

    add(board.steps(FIRST, protocol.seeds, ""), FIRST, f"{protocol.steps} optimiser steps of {BATCH} pairs")
    if protocol.forwards_seeds:
        rows = board.forwards(FIRST, protocol.forwards_seeds)
        add(rows, FIRST, f"{protocol.unet_forwards:,} images through the UNet")
    board.entries = [entry for entry in entries if not entry.own_judge]
    if protocol.second_seeds and board.entries:
        rows = board.steps(SECOND, protocol.second_seeds, "second preference: ")
        add(rows, SECOND, f"{protocol.steps} optimiser steps, pairs and judges of another preference")
    return found


def _kept(kept: dict[str, Any], protocol: dict[str, Any], run: set[str]) -> dict[tuple[str, str], list[Row]]:
    """By preference and budget: an earlier arena's lines of entries that are not run now."""
    if other := [key for key in protocol if kept["protocol"].get(key) != protocol[key]]:
        raise DiffalignError(
            f"the arena whose lines should stay had another protocol ({', '.join(other)}): run all entries instead"
        )
    return {
        (view["preference"], view["budget"]): [row | {"kept": True} for row in view["rows"] if row["name"] not in run]
        for view in kept["views"]
    }


class _Board:
    """The runs of an arena as they come in."""

    def __init__(
        self, arena: ArenaFolder, entries: Sequence[Entry], protocol: Protocol, tuned: dict[str, dict[str, Any]]
    ) -> None:
        self.arena, self.entries, self.protocol, self.tuned = arena, entries, protocol, tuned
        self.base = arena.base(protocol)
        self.shown: dict[str, FinishedJob] = {}  # the base's run and every entry's first, for the page's images
        self.first: dict[tuple[str, int], FinishedJob] = {}  # runs at equal steps on the first preference

    def steps(self, preference: str, seeds: Sequence[int], desc: str) -> list[Row]:
        """Every entry at the protocol's steps."""
        jobs = {
            (entry.name, seed): self._job(entry, preference, seed, "steps") for entry in self.entries for seed in seeds
        }
        done = self._run(jobs, f"{desc}equal steps")
        if preference == FIRST:
            self.first = done
            self.shown |= {entry.name: done[entry.name, seeds[0]] for entry in self.entries}
        return self._rows(done, preference, seeds)

    def forwards(self, preference: str, seeds: Sequence[int]) -> list[Row]:
        """Every entry at the protocol's UNet forwards; a run that took just so many already is used again."""
        limit = self.protocol.unet_forwards
        jobs = {
            key: self._job(entry, preference, key[1], "forwards")
            for entry in self.entries
            for key in ((entry.name, seed) for seed in seeds)
            if self.first[key].forwards != limit
        }
        done = {**self.first, **self._run(jobs, "equal forwards")}
        return self._rows(done, preference, seeds)

    def _job(self, entry: Entry, preference: str, seed: int, view: str) -> Job:
        pairs = self.arena.data(entry, preference)
        tuned = self.tuned.get(entry.settings_of or entry.name, {})
        config = config_of(entry, self.protocol, preference, seed, pairs, tuned)
        if view == "forwards":
            config = at_equal_forwards(config, self.protocol.unet_forwards)
        folder = self.arena.folder / "runs" / preference / view / entry.name / f"seed{seed}"
        return Job(folder, config, self.base.prompts, self.base.seeds)

    def _run(self, jobs: dict[tuple[str, int], Job], desc: str) -> dict[tuple[str, int], FinishedJob]:
        drawn, *done = run_jobs([self.base, *jobs.values()], self.arena.workers, desc)
        self.shown = {"base": drawn, **self.shown}
        return dict(zip(jobs, done, strict=True))

    def _rows(self, done: dict[tuple[str, int], FinishedJob], preference: str, seeds: Sequence[int]) -> list[Row]:
        base = self.shown["base"]
        return [
            leaderboard_row(entry, [done[entry.name, s] for s in seeds], base, preference) for entry in self.entries
        ]


def tables(found: dict[str, Any]) -> str:
    """The record's tables in Markdown, one for each view."""
    parts = []
    for view in found["views"]:
        runs = view["rows"][0]["runs"]
        seeds = "1 training seed" if runs == 1 else f"{runs} training seeds"
        parts.append(
            f"{view['preference']}: {view['budget']}, {seeds}\n\n{leaderboard_table(view['rows'], view['preference'])}"
        )
    return "\n".join(parts)


def _write(folder: Path, found: dict[str, Any], strips: dict[str, str]) -> None:
    first = found["views"][0]
    (folder / "result.json").write_text(json.dumps(found) + "\n")  # indented, curves take a line a number
    (folder / "leaderboard.md").write_text(tables(found))
    (folder / "arena.html").write_text(page(found, strips), encoding="utf-8")
    leaderboard(first["rows"], first["preference"], first["budget"], folder / "leaderboard.png")
