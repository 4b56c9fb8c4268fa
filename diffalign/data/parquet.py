"""Parquet shards, read row group by row group.

Parquet has no access to single rows: reading one reads its row group. Small groups are read directly and the
last ones kept; files with large groups are laid out once as Arrow files in the Hugging Face cache instead,
which gives single rows by memory map at the price of a second copy on disk.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.columns import Columns
from diffalign.data.rows import DataError

log = logging.getLogger(__name__)

LARGE_GROUP = 32 << 20  # bytes: above it, reading a whole row group costs more than decoding the pair in it
KEPT_BYTES = 128 << 20  # bytes of row groups kept in memory by each process


class ParquetColumns:
    """Rows of several parquet files of one schema, in file order."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.storage = f"{len(files)} parquet file" + "s" * (len(files) > 1)
        self._starts: list[int] = []  # first row of each row group
        self._groups: list[tuple[int, int, int]] = []  # (file, row group in it, its first row in the file)
        self.rows, self.largest_group = 0, 0
        schema: pa.Schema | None = None
        for number, file in enumerate(self.files):
            metadata = _metadata(file)
            found = metadata.schema.to_arrow_schema()
            if schema is not None and found.names != schema.names:
                raise DataError(
                    f"{file} has the columns {found.names}, but {files[0]} has {schema.names}; "
                    "give the folder of one data set at a time"
                )
            schema = found
            in_file = 0
            for group in range(metadata.num_row_groups):
                self._starts.append(self.rows + in_file)
                self._groups.append((number, group, in_file))
                in_file += metadata.row_group(group).num_rows
                self.largest_group = max(self.largest_group, metadata.row_group(group).total_byte_size)
            self.rows += in_file
        self.names = tuple(schema.names) if schema is not None else ()
        self._kept: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return self.rows

    def column(self, name: str) -> list[Any]:
        values: list[Any] = []
        for file in self.files:
            with pq.ParquetFile(file, memory_map=True) as opened:
                values += opened.read(columns=[name], use_threads=False)[name].to_pylist()
        return values

    def cells(self, row: int, names: Sequence[str]) -> list[Any]:
        group = bisect_right(self._starts, row) - 1
        table = self._table(group, tuple(names))
        return [table[name][row - self._starts[group]].as_py() for name in names]

    def _table(self, group: int, names: tuple[str, ...]) -> pa.Table:
        key = (group, names)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        number, in_file, _ = self._groups[group]
        # The file is opened anew (a footer read): open handles do not survive a fork into loader workers,
        # and neither does pyarrow's thread pool.
        with pq.ParquetFile(self.files[number], memory_map=True) as file:
            table = file.read_row_group(in_file, columns=list(names), use_threads=False)
        self._kept[key] = table
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return table

    def where(self, row: int) -> str:
        group = bisect_right(self._starts, row) - 1
        number, _, first = self._groups[group]
        return f"{self.files[number].name} row {row - self._starts[group] + first}"

    def fault(self, row: int) -> str | None:
        return None

    def base(self, row: int) -> Path | None:
        return self.files[self._groups[bisect_right(self._starts, row) - 1][0]].parent

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}


def open_parquet(files: Sequence[Path]) -> Columns:
    """The rows of the files, by whichever route gives single rows quickly."""
    direct = ParquetColumns(files)
    if direct.largest_group <= LARGE_GROUP:
        return direct
    from diffalign.data.hub import ArrowColumns, from_parquet

    size = sum(os.path.getsize(file) for file in files) / 2**30
    log.warning(
        "row groups of up to %d MB: laying the rows out once as Arrow files in the Hugging Face cache "
        "(about %.1f GB; HF_DATASETS_CACHE moves it; row_group_size=100 when writing parquet avoids it)",
        direct.largest_group >> 20,
        size,
    )
    return ArrowColumns(from_parquet(files), storage=direct.storage, where=direct.where)


def _metadata(file: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not a readable parquet file ({error}); download it again") from error
