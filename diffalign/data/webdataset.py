"""Webdataset shards: tar files whose members NAME.field.ext make one row per NAME.

Members are read in place by offset; nothing is extracted, so a member's name never becomes a path on disk.
Left out: compressed tars, which have no random access.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.data.columns import ListColumns
from diffalign.data.rows import DataError, ImageRef

TEXT = (".txt", ".cls")
MAX_TEXT = 1 << 16  # bytes of a prompt or label; anything longer is not one


def open_shards(files: Sequence[Path]) -> ListColumns:
    """The rows of uncompressed tar shards, in file and member order."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for file in files:
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    if member.isreg():  # links and devices are passed over
                        _add(rows, file, tar, member)
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{file} is not a plain tar file ({error}); decompress or download it again") from error
    if not rows:
        raise DataError(f"{[str(file) for file in files]} hold no files")
    wheres = [f"{shard} sample {name}" for shard, name in rows]
    storage = f"{len(files)} tar shard" + "s" * (len(files) > 1)
    return ListColumns(list(rows.values()), wheres, storage=storage, base=files[0].parent, files=files)


def _add(
    rows: dict[tuple[str, str], dict[str, Any]], file: Path, tar: tarfile.TarFile, member: tarfile.TarInfo
) -> None:
    folder, _, base = member.name.rpartition("/")
    stem, _, ending = base.partition(".")
    field = ending.split(".")[0]
    name = f"{folder}/{stem}" if folder else stem
    row = rows.setdefault((file.name, name), {})
    if base.endswith(TEXT):
        stream = tar.extractfile(member)
        text = stream.read(MAX_TEXT + 1) if stream is not None and member.size <= MAX_TEXT else b""
        # NAME.txt, the plain caption file of many webdatasets, is the prompt
        row["prompt" if field == "txt" else field] = text.decode("utf-8", "replace").strip()
    else:
        where = f"{file.name} sample {name} {field}"
        row[field] = ImageRef(None, str(file), where, (member.offset_data, member.size))
