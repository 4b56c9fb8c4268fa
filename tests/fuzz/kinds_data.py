"""Pairs in every storage, and single images."""

from __future__ import annotations

import csv
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffalign.data.row import ImageError, ImageRef
from diffalign.data.spec import DataSpec
from diffalign.data.table.report import check_pairs
from diffalign.data.transforms import prepare, prepare_pair
from tests.data.helpers import pick_rows, picture, png
from tests.fuzz.harness import Run
from tests.fuzz.odd import as_bytes, damaged, json_text, mutated, scalar, value

ROWS = 4
SIDE = 16  # pixels


def table(rng: Random, folder: Path) -> Run:
    """Pairs of which one row, or the file, is odd; `data check` and every usable pair's pixels."""
    write = rng.choice((_listing, _listing, _csv, _parquet, _parquet, _folder, _hpdv2, _tar))
    path, good = write(rng, folder)
    if path.is_file() and rng.random() < 0.25:
        path.write_bytes(damaged(rng, path.read_bytes()))
        good = 0
    verify = rng.choice(("none", "header", "full"))
    keep_ties = rng.random() < 0.3

    def run() -> Any:
        report = check_pairs(path, DataSpec(verify=verify, keep_ties=keep_ties), resolution=SIDE)
        json.dumps(report.json(), allow_nan=False)
        assert report.text()
        assert report.usable + len([p for p in report.problems if p.dropped]) >= good, "rows left out without a word"
        assert report.usable >= good, f"{report.usable} of {good} good rows: {[str(p) for p in report.problems][:2]}"
        return report.table.identity, [_pixels(report.table, i) for i in range(len(report.table))]

    return run


def _pixels(pairs: Any, index: int) -> Any:
    numbers = [pairs.number(part, index) for part in ("weight", "margin")]
    try:
        pixels, geometry = prepare_pair(pairs[index], (SIDE, SIDE), key=index, center_crop=False, random_flip=True)
    except ImageError:  # training takes another pair in its place, and says so
        return 0
    assert pixels.shape == (2, 3, SIDE, SIDE), pixels.shape
    assert float(pixels.abs().max()) <= 1.001
    return pixels, geometry, [number for number in numbers if number is not None]


def _rows(rng: Random, folder: Path) -> list[dict[str, Any]]:
    (folder / "images").mkdir()
    for i in range(2 * ROWS):
        (folder / "images" / f"{i}.png").write_bytes(png(i, (18, SIDE)))
    extra = {"weight": 0.5, "margin": 1.0} if rng.random() < 0.3 else {}
    return [
        {"prompt": f"prompt {i}", "chosen": f"images/{2 * i}.png", "rejected": f"images/{2 * i + 1}.png", **extra}
        for i in range(ROWS)
    ]


def _listing(rng: Random, folder: Path) -> tuple[Path, int]:
    rows: list[Any] = _rows(rng, folder)
    odd = rng.randrange(ROWS)
    rows[odd] = mutated(rng, rows[odd], rng.randrange(1, 3))
    file = folder / "pairs.jsonl"
    file.write_bytes(as_bytes("".join(json_text(row) + "\n" for row in rows)))
    return file, ROWS - 1


def _csv(rng: Random, folder: Path) -> tuple[Path, int]:
    rows = _rows(rng, folder)
    rows[2][rng.choice(list(rows[2]))] = str(scalar(rng))
    suffix, delimiter = rng.choice(((".csv", ","), (".tsv", "\t"), (".csv", ";"), (".CSV", ",")))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    file = folder / f"pairs{suffix}"
    file.write_bytes(as_bytes(text.getvalue()))
    return file, 0


def _parquet(rng: Random, folder: Path) -> tuple[Path, int]:
    rows = pick_rows(ROWS)
    if rng.random() < 0.5:
        rows = [{"prompt": r["caption"], "chosen": r["jpg_0"], "rejected": r["jpg_1"]} for r in rows]
    odd, cell = rng.randrange(ROWS), rng.choice(list(rows[0]))
    odd_bytes = (damaged(rng, png(9)), b"") if isinstance(rows[0][cell], bytes) else ()  # of one type, as parquet is
    rows[odd][cell] = rng.choice((None, value(rng), float("nan"), -1.0, 0.5, *odd_bytes))
    good = ROWS - 1
    if rng.random() < 0.2:  # every cell of a column in a list or a mapping
        shape = rng.choice((lambda x: [x], lambda x: {"bytes": x}, lambda x: {"path": "x.png", "bytes": x}))
        rows, good = [{**row, cell: shape(row[cell])} for row in rows], 0
    file = folder / "pairs.parquet"
    try:
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        file.write_bytes(as_bytes(repr(rows)[:1000]))
        return file, 0
    return file, good


def _folder(rng: Random, folder: Path) -> tuple[Path, int]:
    place = folder / "pairs"
    for i in range(ROWS):
        for side in ("chosen", "rejected"):
            (place / side).mkdir(parents=True, exist_ok=True)
            (place / side / f"{i}.png").write_bytes(png(i + 10 * (side == "chosen"), (18, SIDE)))
        (place / f"{i}.txt").write_bytes(as_bytes(f"prompt {i}" if i else str(scalar(rng))))
    if rng.random() < 0.4:
        captions = mutated(rng, {f"{i}": f"prompt {i}" for i in range(ROWS)}, 2)
        (place / "captions.json").write_bytes(as_bytes(json_text(captions)))
    files = [file for file in sorted(place.rglob("*")) if file.is_file()]
    for file in rng.sample(files, rng.randrange(3)):
        if rng.random() < 0.5:
            file.write_bytes(damaged(rng, file.read_bytes()))
        else:
            file.rename(file.with_suffix(rng.choice((".PNG", ".gif", ".caption", ".TXT", ".png.txt", ""))))
    return place, 0


def _hpdv2(rng: Random, folder: Path) -> tuple[Path, int]:
    _rows(rng, folder)
    entries: list[Any] = [
        {
            "prompt": f"prompt {i}",
            "image_path": [f"images/{2 * i}.png", f"images/{2 * i + 1}.png"],
            "human_preference": [i % 2, 1 - i % 2],
        }
        for i in range(ROWS)
    ]
    odd = rng.randrange(ROWS)
    entries[odd] = mutated(rng, entries[odd], rng.randrange(1, 3))
    file = folder / "test.json"
    file.write_bytes(as_bytes(json_text(entries)))
    return file, ROWS - 1


def _tar(rng: Random, folder: Path) -> tuple[Path, int]:
    file = folder / "pairs.tar"
    with tarfile.open(file, "w") as tar:
        for i in range(ROWS):
            parts = {"original_prompt.txt": b"prompt", "jpg_0.jpg": png(2 * i), "jpg_1.jpg": png(2 * i + 1),
                     "label_0.txt": b"1"}  # fmt: skip
            if i == 1:
                name = rng.choice(list(parts))
                parts[name] = rng.choice((damaged(rng, parts[name]), as_bytes(str(scalar(rng)))))
            for name, data in parts.items():
                member = tarfile.TarInfo(f"{i:06d}.{name}" if i != 2 or name[0] != "j" else f"../{i:06d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file, 0


MODES = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I",
    "I;16",
    "I;16B",
    "F",
    "La",
)


def image(rng: Random, folder: Path) -> Run:
    """One encoded image of any mode, format and shape, whole or damaged."""
    size = rng.choice(((SIDE, SIDE), (18, SIDE), (1, 1), (1, 300), (4000, 8), (8, 9), (64, 64)))
    found = plain = picture(rng.randrange(99), size)
    mode, stream = rng.choice(MODES), io.BytesIO()
    try:
        found = found.convert("RGBA").convert(mode) if mode in ("La", "PA") else found.convert(mode)
    except (ValueError, OSError):
        found = Image.new(mode, size, 7)
    try:
        found.save(stream, rng.choice(("PNG", "PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "ICO", "PPM", "JPEG2000")))
    except (OSError, ValueError, KeyError):
        plain.save(stream, "PNG")
    data = stream.getvalue()
    if rng.random() < 0.1:
        data = _with_header(png(1), rng.choice(((60000, 60000), (2**31 - 1, 1), (0, 5), (13000, 13000))))
    if rng.random() < 0.6:
        data = damaged(rng, data)
    file = folder / "a.png"
    file.write_bytes(data)
    ref = ImageRef(data, None, "row 1") if rng.random() < 0.5 else ImageRef(None, str(file), "row 1")

    def run() -> Any:
        opened = ref.open()
        assert opened.mode == "RGB", opened.mode
        pixels, geometry = prepare(opened, (SIDE, SIDE), 0.5, flip=False)
        assert float(pixels.abs().max()) <= 1.001
        return pixels, geometry

    return run


def _with_header(data: bytes, size: tuple[int, int]) -> bytes:
    """A PNG whose header promises another size, with the checksum that fits it."""
    header = b"IHDR" + struct.pack(">II", *size) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
