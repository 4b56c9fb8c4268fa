"""Webdataset shards: tar files whose members NAME.field.ext make one row per NAME.

Members are read in place by offset; nothing is extracted, so a member's name never becomes a path on disk.
Left out: compressed tars, which have no random access.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.data.formats.columns import ListColumns
from diffalign.data.formats.text_files import odd
from diffalign.data.row import DataError, ImageRef, stand_in

TEXT = (".txt", ".cls")
MAX_TEXT = 1 << 16  # bytes of a prompt or label; anything longer is not one


def open_shards(files: Sequence[Path]) -> ListColumns:
    """The rows of uncompressed tar shards, in file and member order. Raises DataError for one that is not complete."""
    rows: dict[tuple[Path, str], dict[str, Any]] = {}
    faults: dict[tuple[Path, str], str] = {}
    for file in files:
        last = None
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    last = member.name
                    if member.isreg():  # links and devices are passed over
                        _add(rows, faults, file, tar, member)
                end = tar.offset
        except (tarfile.TarError, EOFError) as error:
            with open(file, "rb") as stream:
                if (instead := stand_in(stream.read(64))) is not None:
                    raise DataError(f"{file}: {instead}") from error
            after = f" after its member {last!r}" if last is not None else ""
            raise DataError(
                f"{file} is not a plain tar file, or is cut short{after} ({error}); decompress or download it again"
            ) from error
        _whole(file, end, last)
    if not rows:
        raise DataError(f"{[str(file) for file in files]} contain no files")
    places = {key: place for place, key in enumerate(rows)}
    return ListColumns(
        list(rows.values()),
        [f"{shard.name} sample {name}" for shard, name in rows],
        storage=f"{len(files)} tar shard" + "s" * (len(files) > 1),
        base=files[0].parent,
        faults={places[key]: fault for key, fault in faults.items()},
        files=files,
    )


def _whole(file: Path, end: int, last: str | None) -> None:
    """Raise DataError unless zeros, tar's mark of the end, follow the last member and nothing else does.

    `tarfile` stops without a word where the file ends between members, and at a header that it cannot read.
    """
    with open(file, "rb") as stream:
        stream.seek(end)
        rest = stream.read(tarfile.BLOCKSIZE)
        zeros = len(rest) == tarfile.BLOCKSIZE and not any(rest)
        while rest and not any(rest):
            rest = stream.read(1 << 20)
    if not zeros:
        what = "is cut short" if len(rest) < tarfile.BLOCKSIZE else "has a damaged member"
        raise DataError(
            f"{file} {what} after its member {last!r} (byte {end}); download it again, or repack it with tar"
        )
    if rest:
        raise DataError(
            f"{file} continues after the end mark that follows its member {last!r} (byte {end}): several "
            "archives were joined with cat; name them one by one, or repack them with tar"
        )


def _add(
    rows: dict[tuple[Path, str], dict[str, Any]],
    faults: dict[tuple[Path, str], str],
    file: Path,
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
) -> None:
    folder, _, base = member.name.rpartition("/")
    stem, _, ending = base.partition(".")
    field = ending.split(".")[0]
    name = f"{folder}/{stem}" if folder else stem
    row = rows.setdefault((file, name), {})
    is_text = base.lower().endswith(TEXT)
    column = "prompt" if is_text and field.lower() == "txt" else field  # NAME.txt is the caption of many webdatasets
    fault = f"has two members for {column} (the second is {member.name})" if column in row else odd(member.name)
    if not is_text:
        where = f"{file.name} sample {name} {field}"
        row[column] = ImageRef(None, str(file), where, (member.offset_data, member.size))
    elif member.size > MAX_TEXT:
        fault = f"{member.name} has {member.size} bytes; a string has at most {MAX_TEXT}"
        row[column] = None
    else:
        stream = tar.extractfile(member)
        raw = b"" if stream is None else stream.read()
        row[column] = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").strip()
        fault = fault or ((why := odd(row[column])) and f"{member.name} {why}; save it as UTF-8")
    if fault:
        faults.setdefault((file, name), fault)
