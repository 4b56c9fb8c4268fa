"""A disk that is full, read-only, broken or slow, and files that vanish: what every command does, and how it goes on.

    python -m benchmarks.faults --out runs/faults                     # every kind of benchmarks/kill_kinds.py
    python -m benchmarks.faults --out runs/faults --only generate --tries 5

From a random file operation on, every write below the command's folder fails with the system's own error (or every
operation takes 20 ms; or an input file is gone when it is opened). The command must end with one message (exit status
2, which names the file), never with a traceback, or do without what it could not write. Then the fault is over: the
same command is given again and must end with the files of a run that had no fault, to the byte.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.forked import WRITING, Death, Ended, Watch, import_all, run_forked
from benchmarks.kill_kinds import KINDS, Kind, prepare
from benchmarks.kills import Campaign, differences, state_of
from benchmarks.memory import table

ERRORS = {"full disk": errno.ENOSPC, "read-only": errno.EROFS, "broken disk": errno.EIO}
SLOW, VANISHED = "slow disk", "vanished file"
FAULTS = (*ERRORS, SLOW, VANISHED)
REMOVING = ("os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")  # a full disk allows these
DELAY = 0.02  # seconds of an operation of a slow disk


class Faulty(Watch):
    """A disk with the fault `self.fault` from the operation of `death` on; for `VANISHED`, of the inputs."""

    fault = ""

    def __init__(self, place: Path, death: Death, side: Path) -> None:
        super().__init__(place, death, side)
        self.inputs, self.gone, self.reads = f"{place.parent.resolve() / 'inputs'}{os.sep}", "", 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Raises the error of the fault where it is time."""
        if self.busy or os.getpid() != self.pid:
            return
        if self.fault == VANISHED:
            self._vanish(event, arguments)
        elif (path := self.changed(event, arguments)) is not None:
            self.count += 1
            at = self.death.operation
            if self.fault == SLOW:
                time.sleep(DELAY)
            elif at is not None and self.count >= at and (event not in REMOVING or self.fault != "full disk"):
                number = ERRORS[self.fault]
                raise OSError(number, os.strerror(number), path)

    def _vanish(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if event == "open" and isinstance(arguments[0], str | os.PathLike) else ""
        if not path.startswith(self.inputs) or arguments[2] & WRITING or os.path.isdir(path):
            return
        self.reads += 1
        self.gone = path if self.reads == self.death.operation else self.gone
        if path == self.gone:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def attempt(one: Campaign, fault: str, twin: tuple[dict[str, str], Ended], rng: random.Random) -> dict[str, Any]:
    """What a command does under a fault, and what is wrong with it and with its end."""
    state, whole = twin
    kind = type("Kind", (Faulty,), {"fault": fault})
    death = Death(operation=rng.randint(1, 12 if fault == VANISHED else max(whole.operations, 1)))
    one.start()
    ended = run_forked(one.words, one.place, death, one.kind.processes, one.kind.environment, kind)
    log = ended.log.read_text()
    wrong = []
    if ended.code not in (0, 2) or (ended.code and "Traceback" in log) or (ended.code and fault == SLOW):
        wrong.append(f"exit status {ended.code}: {log[-1500:]}")
    again = one.run(again=True)
    refused = bool(one.kind.finished) and one.kind.finished in again.log.read_text()
    if again.code and not refused:
        wrong.append(f"given again: {again.code}: {again.log.read_text()[-1500:]}")
    wrong += differences(state_of(one.place), state)
    said = log.strip().splitlines()[-1:] if ended.code else []
    return {"fault": fault, "operation": death.operation, "code": ended.code, "said": said, "wrong": wrong}


def tried(name: str, kind: Kind, work: Path, tries: int, seed: int) -> dict[str, Any]:
    """A line of the table: how many attempts ended rightly, by fault."""
    one = Campaign(name, kind, work, work / "inputs")
    twin = one.twin()
    rows = [
        attempt(one, fault, twin, random.Random(f"{seed} {name} {fault} {number}"))
        for fault in FAULTS
        for number in range(tries)
    ]
    for row in rows:
        if row["wrong"]:
            print(f"{name}: {row}", flush=True)
    return {"kind": name, "rows": rows}


def lines_of(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: right attempts by fault, of all, and how many of them ended with a message."""
    lines = []
    for one in found:
        cells = []
        for fault in FAULTS:
            rows = [row for row in one["rows"] if row["fault"] == fault]
            right, said = sum(not row["wrong"] for row in rows), sum(row["code"] == 2 for row in rows)
            cells.append(f"{right} of {len(rows)} ({said})")
        lines.append([one["kind"], *cells])
    return table(["kind", *FAULTS], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--only", nargs="+", choices=list(KINDS), metavar="KIND", help="default: all")
    p.add_argument("--tries", type=int, default=2, help="of each fault and kind (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args(arguments)
    kinds = {name: KINDS[name] for name in a.only or KINDS}
    work = (a.out / "work").resolve()
    shutil.rmtree(work, ignore_errors=True)
    import_all()
    prepare(work / "inputs", kinds)
    found = []
    for name, kind in kinds.items():
        found.append(tried(name, kind, work, a.tries, a.seed))
        (a.out / "faults.json").write_text(json.dumps(found, indent=2) + "\n")
        note = "\nRight attempts of all; in brackets, how many of them ended with a message.\n"
        command = f"    python -m benchmarks.faults --out runs/faults --tries {a.tries} --seed {a.seed}\n\n"
        (a.out / "faults.md").write_text(f"{command}{lines_of(found)}{note}")
        print(lines_of(found[-1:]).splitlines()[2], flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
