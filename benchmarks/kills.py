"""Kills commands with SIGKILL, continues them, and compares what they leave with what an uninterrupted run leaves.

    python -m benchmarks.kills --out runs/kills                       # every kind of benchmarks/kill_kinds.py
    python -m benchmarks.kills --out runs/kills --only encode --kills 3 --seed 7

An attempt starts in an empty folder. It is killed at a random instant, or at a random file operation (a third of these
with a torn write), continued with its own command, maybe killed again (up to three times), and ends. Then every file is
compared with the twin's, to the byte: weights, optimiser states, logs with their counters, tables, images and pages.
Not compared: `run.json` (the command of the last start), `run.html` and the seconds in `timing.jsonl`. What a kill
leaves and no command reads is counted: temporary files, locks, and checkpoints that were set aside.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.distributed.checkpoint import FileSystemReader

from benchmarks.forked import Death, Ended, import_all, run_forked
from benchmarks.kill_kinds import KINDS, Kind, prepare, slug

NOT_COMPARED = ("run.json", "run.html")
MODES = ("instant", "file operation", "torn write")
MOST = 3  # kills of one attempt
LEFT = (".partial", ".abandoned", ".diffalign.lock")  # in names of what a kill leaves and nothing reads


def state_of(folder: Path) -> dict[str, str]:
    """Hash of each file's compared content, by its path below the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(file.relative_to(folder)): _digest(file)
        for file in files
        if file.name not in NOT_COMPARED and not _left(file.relative_to(folder))
    }


def left_in(folder: Path) -> int:
    """Files that a kill left and no command reads."""
    return sum(path.is_file() and _left(path.relative_to(folder)) for path in folder.rglob("*"))


def _left(path: Path) -> bool:
    return any(mark in part for part in path.parts for mark in LEFT)


def _digest(file: Path) -> str:
    """A hash. torch.save's bytes depend on which strings are one object, so states are compared by their values."""
    if file.suffix == ".pt":
        return _hash_of(torch.load(file, map_location="cpu", weights_only=True))
    if file.name == ".metadata":  # of sharded states: where each part lies, with a random id
        found = FileSystemReader(file.parent).read_metadata()
        return hashlib.sha256(repr((found.state_dict_metadata, found.storage_data)).encode()).hexdigest()
    content = file.read_bytes()
    if file.name == "timing.jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        content = repr([{k: v for k, v in line.items() if k != "seconds"} for line in lines]).encode()
    if file.name == "manifest.json" and "content" in (tree := json.loads(content)):  # a run's: hashes of its files
        files = tree["content"]["files"]
        states = {name: None for name in files if name.endswith((".pt", ".metadata"))}
        content = repr(tree["content"] | {"files": files | states}).encode()
    return hashlib.sha256(content).hexdigest()


def _hash_of(values: Any) -> str:
    """Of nested dicts and lists of tensors and plain values."""
    if isinstance(values, torch.Tensor):
        whole = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(f"{values.dtype} {tuple(values.shape)} ".encode() + whole).hexdigest()
    if isinstance(values, dict):
        return hashlib.sha256(repr([(k, _hash_of(v)) for k, v in values.items()]).encode()).hexdigest()
    if isinstance(values, list | tuple):
        return hashlib.sha256(repr([_hash_of(v) for v in values]).encode()).hexdigest()
    return repr(values)


def differences(found: dict[str, str], twin: dict[str, str]) -> list[str]:
    """Files that are missing, more, or of another content."""
    return (
        [f"{name} is missing" for name in twin if name not in found]
        + [f"{name} is not the twin's" for name in found if name not in twin]
        + [f"{name} differs" for name in found if name in twin and found[name] != twin[name]]
    )


class Campaign:
    """Attempts of one kind in one place, so that paths in files are equal."""

    def __init__(self, name: str, kind: Kind, folder: Path, inputs: Path) -> None:
        self.kind, self.inputs, self.words = kind, inputs, kind.words(name, inputs)
        self.place = folder / slug(name)

    def start(self) -> None:
        """An empty place, with this kind's own copies."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        for name in self.kind.copied:
            shutil.copytree(self.inputs / name, self.place / name)

    def run(self, death: Death | None = None, again: bool = False) -> Ended:
        """The command once, maybe killed."""
        words = [*self.words, *(self.kind.again.split() if again else [])]
        return run_forked(words, self.place, death, self.kind.processes, self.kind.environment)

    def twin(self) -> tuple[dict[str, str], Ended]:
        """The state of an uninterrupted run. Raises RuntimeError where it fails."""
        self.start()
        ended = self.run()
        if ended.code:
            raise RuntimeError(f"{self.words} ends with {ended.code}: {ended.log.read_text()[-3000:]}")
        return state_of(self.place), ended

    def attempt(self, twin: tuple[dict[str, str], Ended], rng: random.Random) -> dict[str, Any]:
        """Kills by mode, and what is wrong with the end."""
        self.start()
        state, whole = twin
        kills: Counter[str] = Counter()
        deaths: list[Death] = []
        for _ in range(1 if rng.random() < 0.6 else MOST):
            death = _drawn(whole, rng)
            ended = self.run(death, again=bool(kills))
            if ended.code != -9:
                break
            kills[death.kind] += 1
            deaths.append(death)
        else:
            ended = self.run(again=True)
        log = ended.log.read_text()[-1500:]
        refused = bool(kills and self.kind.finished) and self.kind.finished in log
        faults = [f"exit status {ended.code}: {log}"] if ended.code and not refused else []
        faults += differences(state_of(self.place), state)
        return {"kills": dict(kills), "deaths": list(map(str, deaths)), "faults": faults, "left": left_in(self.place)}


def _drawn(whole: Ended, rng: random.Random) -> Death:
    mode = rng.choice(MODES)
    if mode == "instant" or not whole.operations:
        return Death(seconds=rng.uniform(0, whole.seconds))
    return Death(operation=rng.randint(1, whole.operations), torn=mode == "torn write")


def campaign(name: str, kind: Kind, folder: Path, inputs: Path, kills: int, seed: int) -> dict[str, Any]:
    """A row of the table: attempts until there were so many kills."""
    one = Campaign(name, kind, folder, inputs)
    twin = one.twin()
    rows: list[dict[str, Any]] = []
    while sum(sum(row["kills"].values()) for row in rows) < kills and len(rows) < 3 * kills:
        row = one.attempt(twin, random.Random(f"{seed} {name} {len(rows)}"))
        rows.append(row)
        if row["faults"]:
            print(f"{name}: {row}", flush=True)
    by_mode = {mode: sum(row["kills"].get(mode, 0) for row in rows) for mode in MODES}
    return {
        "kind": name,
        "processes": kind.processes,
        "attempts": len(rows),
        **by_mode,
        "kills": sum(by_mode.values()),
        "files": len(twin[0]),
        "operations": twin[1].operations,
        "left": sum(row["left"] for row in rows),
        "equal": sum(not row["faults"] for row in rows),
        "faults": [row for row in rows if row["faults"]],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a kind, and the sums."""
    heads = ("kind", "processes", "attempts", *MODES, "kills", "files", "equal")
    sums = {head: sum(row[head] for row in rows) for head in (*MODES, "kills", "attempts", "equal")}
    lines = [[str(row[head]) for head in heads] for row in rows]
    lines.append([f"{len(rows)} kinds", "", *(str(sums.get(head, "")) for head in heads[2:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines]) + "\n"


def write(out: Path, rows: Sequence[dict[str, Any]], seed: int) -> None:
    """kills.json and kills.md."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "kills.json").write_text(json.dumps({"seed": seed, "kinds": list(rows)}, indent=2) + "\n")
    command = f"    python -m benchmarks.kills --out runs/kills --seed {seed}\n"
    note = (
        "\nAn attempt is killed one to three times and continued with its own command; `equal` attempts ended with\n"
        "every compared file as in the uninterrupted twin, `files` of them, to the byte. Modes and what is compared:\n"
        "benchmarks/kills.py; the commands: benchmarks/kill_kinds.py.\n"
    )
    (out / "kills.md").write_text(f"{command}\n{table(rows)}{note}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True, help="folder for kills.json and kills.md")
    p.add_argument("--work", type=Path, help="folder for the runs, removed at the end (default: OUT/work)")
    p.add_argument("--only", nargs="+", choices=list(KINDS), metavar="KIND", help="default: all")
    p.add_argument("--kills", type=int, default=12, help="kills of each kind (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args(arguments)
    kinds = {name: KINDS[name] for name in a.only or KINDS}
    work = (a.work or a.out / "work").resolve()
    shutil.rmtree(work, ignore_errors=True)
    import_all()
    prepare(work / "inputs", kinds)
    rows = []
    for name, kind in kinds.items():
        rows.append(campaign(name, kind, work, work / "inputs", a.kills, a.seed))
        print(table(rows[-1:]).splitlines()[2], flush=True)
        write(a.out, rows, a.seed)
    shutil.rmtree(work)
    print(table(rows))
    if any(row["faults"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
