"""Opening and reading data sets of 10² to 10⁶ pairs: seconds, memory and milliseconds a pair.

    python -m benchmarks.data_scale --out runs/data_scale                                # parquet and jsonl, to 10⁵
    python -m benchmarks.data_scale --out runs/data_scale --rows 100 1000000 --layouts parquet arrow jsonl tar

Pairs are tiny (8 x 8 pixels) and differ in their prompts and uids, so that what is measured is what grows with their
number. Each row is measured in processes of its own, with a folder for notes of its own. Seconds are of CPU, as other
processes may share the machine; the files are in memory.

    first, s      the first start: rows are examined (`verify: none`; `header` reads every image once besides)
    start, s      every later start: what was noted is read
    identity, s   the hashes that a run stores and a resumed run compares
    memory, MB    of a process that has opened them and read pairs, beyond one that has opened 100
    ms/pair       reading both images of pairs in the order of a run, 600 of them after 100
    check, s      `diffalign data check` (`verify: header`); --check
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from diffalign.data.table.file_hash import SETTLED

ROWS = (100, 1_000, 10_000, 100_000)
SHARD = 10_000  # rows of a file
GROUP = 100  # rows of a row group
FILES = 512  # image files of the jsonl layout, which its rows share two by two
READ, UNTIMED = 600, 100  # pairs


def images(count: int) -> list[bytes]:
    """Different PNG files of 8 x 8 pixels."""
    from PIL import Image

    found = []
    for number in range(count):
        out = io.BytesIO()
        Image.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(out, "PNG")
        found.append(out.getvalue())
    return found


def prompt(row: int) -> str:
    """The prompt of a row; five rows have the same."""
    return f"a photo of the object with the number {row // 5} on a table"


def write_parquet(folder: Path, rows: int) -> Path:
    """Shards in Pick-a-Pic's columns, with uids."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = images(FILES)
    for first in range(0, rows, SHARD):
        some = range(first, min(first + SHARD, rows))
        table = pa.table(
            {
                "caption": [prompt(i) for i in some],
                "jpg_0": [pictures[2 * i % FILES] for i in some],
                "jpg_1": [pictures[(2 * i + 1) % FILES] for i in some],
                "label_0": [float(i % 2) for i in some],
                "label_1": [1.0 - i % 2 for i in some],
                "image_0_uid": [f"{i:08x}-a" for i in some],
                "image_1_uid": [f"{i:08x}-b" for i in some],
            }
        )
        pq.write_table(table, folder / f"train-{first // SHARD:05d}.parquet", row_group_size=GROUP)
    return folder


def write_arrow(folder: Path, rows: int) -> Path:
    """What `Dataset.save_to_disk` writes of the same rows."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    (folder / "parquet").mkdir()
    files = sorted(map(str, write_parquet(folder / "parquet", rows).iterdir()))
    Dataset.from_parquet(files, cache_dir=str(folder / "cache")).save_to_disk(folder / "saved")
    return folder / "saved"


def write_jsonl(folder: Path, rows: int) -> Path:
    """A listing whose rows name image files."""
    (folder / "images").mkdir()
    for number, content in enumerate(images(FILES)):
        (folder / f"images/{number}.png").write_bytes(content)
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(rows):
            one, two = (f"images/{(2 * i + side) % FILES}.png" for side in (0, 1))
            line = {"prompt": prompt(i), "chosen": one, "rejected": two, "uid": f"{i:08x}"}
            file.write(json.dumps(line) + "\n")
    return folder / "pairs.jsonl"


def write_tar(folder: Path, rows: int) -> Path:
    """Webdataset shards."""
    pictures = images(FILES)
    for first in range(0, rows, SHARD):
        with tarfile.open(folder / f"{first // SHARD:05d}.tar", "w") as tar:
            for i in range(first, min(first + SHARD, rows)):
                members = {
                    "txt": prompt(i).encode(),
                    "chosen.png": pictures[2 * i % FILES],
                    "rejected.png": pictures[(2 * i + 1) % FILES],
                }
                for ending, content in members.items():
                    info = tarfile.TarInfo(f"{i:08x}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


LAYOUTS: dict[str, Callable[[Path, int], Path]] = {
    "parquet": write_parquet,
    "arrow": write_arrow,
    "jsonl": write_jsonl,
    "tar": write_tar,
}


def resident() -> float:
    """MB of 10^6 bytes that this process has in memory, without what it maps from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
    return kilobytes * 1024 / 1e6


def measured(path: Path, check: bool) -> dict[str, float]:
    """One start on some data."""
    from diffalign.data.sampler import PairOrder
    from diffalign.data.spec import DataSpec
    from diffalign.data.table.identity import data_identity
    from diffalign.data.table.open import open_pairs
    from diffalign.data.table.report import check_pairs

    clock = time.process_time
    found, before, began = {}, resident(), clock()
    if check:
        report = check_pairs(str(path), DataSpec(verify="header"))
        assert report.text()
        return {"check": clock() - began}
    table = open_pairs(path, DataSpec(verify="none"))
    found["start"], began = clock() - began, clock()
    data_identity(table)
    found["identity"] = clock() - began
    order, pairs = PairOrder(len(table), seed=0), itertools.count()
    for place in itertools.islice(pairs, READ + UNTIMED):
        if place == UNTIMED:
            began = clock()
        row = table[order(place)[0]]
        row.chosen.open()
        row.rejected.open()
    found["ms/pair"] = (clock() - began) * 1000 / READ
    found["memory"] = resident() - before
    assert len(table.ids) == table.total_rows
    return found


def _in_child(work: Path, path: Path, check: bool) -> dict[str, float]:
    from benchmarks.forked import in_child

    note = work / "measured.json"
    in_child(lambda: note.write_text(json.dumps(measured(path, check))))
    found: dict[str, float] = json.loads(note.read_text())
    return found


def row_of(layout: str, rows: int, work: Path, check: bool) -> dict[str, Any]:
    """A line of the table."""
    shutil.rmtree(work, ignore_errors=True)
    (work / "data").mkdir(parents=True)
    os.environ["XDG_CACHE_HOME"] = str(work / "notes")
    path = LAYOUTS[layout](work / "data", rows)
    time.sleep(SETTLED + 0.5)  # notes are made of files that nobody writes any more
    first = _in_child(work, path, check=False)
    line = {"layout": layout, "rows": rows, "first": first["start"], **_in_child(work, path, check=False)}
    if check:
        line |= _in_child(work, path, check=True)
    shutil.rmtree(work)
    return line


def write(out: Path, lines: Sequence[dict[str, Any]], arguments: str) -> None:
    """data_scale.json and data_scale.md."""
    from benchmarks.memory import table

    keys = ("first", "start", "identity", "memory", "ms/pair", "check")
    heads = ["layout", "rows", "first, s", "start, s", "identity, s", "memory, MB", "ms/pair", "check, s"]
    rows = [
        [line["layout"], f"{line['rows']:,}"] + [f"{line[key]:.3g}" if key in line else "" for key in keys]
        for line in lines
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "data_scale.json").write_text(json.dumps(list(lines), indent=2) + "\n")
    text = f"    python -m benchmarks.data_scale --out runs/data_scale {arguments}\n\n{table(heads, rows)}"
    (out / "data_scale.md").write_text(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["parquet", "jsonl"])
    p.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    p.add_argument("--check", action="store_true", help="time `data check` as well")
    a = p.parse_args(arguments)
    words = [f"--layouts {' '.join(a.layouts)}", f"--rows {' '.join(map(str, a.rows))}", *["--check"] * a.check]
    lines = []
    for layout, rows in itertools.product(a.layouts, a.rows):
        lines.append(row_of(layout, rows, (a.out / "work").resolve(), a.check))
        print({key: round(x, 4) if isinstance(x, float) else x for key, x in lines[-1].items()}, flush=True)
        write(a.out, lines, " ".join(words))


if __name__ == "__main__":
    main()
