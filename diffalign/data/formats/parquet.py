"""Parquet shards, read row group by row group.

Parquet has no access to single rows: reading one reads its row group, and training visits rows in random order.
Small groups are read directly, and those used last stay in memory; files with large groups are converted once to Arrow
files in the Hugging Face cache, which gives single rows by memory map at the price of a second copy on disk.
"""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.formats.arrow_values import plain
from diffalign.data.formats.columns import Columns
from diffalign.data.row import DataError, stand_in
from diffalign.data.table.file_hash import files_state, recall_note, write_note
from diffalign.io.files import written_whole

log = logging.getLogger(__name__)

SURPLUS = 4 << 20  # bytes read beside the row wanted: above it, reading costs about as much as decoding the pair
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)  # what damaged files raise, the last of column names
PAIRS_PER_GROUP = 16  # rows of a row group that is written, which is what reading one row costs
MEMORY_BYTES = 128 << 20  # of row groups in memory, in each process
MANY_GROUPS = 500  # row groups whose footers take milliseconds to parse: what opening needs of them is noted
FOOTER_BYTES = 16 << 20  # of footers as they are stored; parsed, they take several times as much


class ParquetColumns:
    """Rows of several parquet files of one schema, in file order."""

    in_memory = False

    def __init__(self, files: Sequence[Path]) -> None:
        self.files: Sequence[Path] = list(files)
        self.storage = f"{len(files)} parquet file" + "s" * (len(files) > 1)
        state = self._state()
        facts = recall_note("footers", state)
        if facts is None:
            facts = self._read_footers()
            if sum(map(len, facts["rows"])) >= MANY_GROUPS:
                write_note("footers", state, facts)
        self.names: tuple[str, ...] = tuple(facts["names"])
        self.bytes, self.surplus, self.row_bytes = facts["bytes"], facts["surplus"], facts["row_bytes"]
        starts = [0, *accumulate(chain.from_iterable(facts["rows"]))]
        self.rows, self._starts = starts[-1], array("q", starts[:-1])  # the first row of each row group
        self._first_groups = [0, *accumulate(map(len, facts["rows"]))][:-1]  # the first row group of each file
        self._memory: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._memory_bytes = 0
        self._footers: OrderedDict[int, pq.FileMetaData] = OrderedDict()  # by the number of the file, last used last
        self._footer_bytes = 0

    def _state(self) -> str | None:
        """Changes with the files; None where nothing is noted about them."""
        return files_state(self.files)

    def _read_footers(self) -> dict[str, Any]:
        """What opening needs of all footers. Raises DataError.

        names: of the columns; rows: of each row group, by file; bytes: of all row groups; surplus: bytes of a row group
        beside one row of it, at most; row_bytes: of a row in that group.
        """
        names: list[str] | None = None
        facts: dict[str, Any] = {"rows": [], "bytes": 0, "surplus": 0, "row_bytes": 0}
        for number, file in enumerate(self.files):
            metadata = self.read_footer(number)
            found = metadata.schema.to_arrow_schema().names
            if names is not None and found != names:
                raise DataError(
                    f"{file} has the columns {found}, but {self.files[0]} has {names}; give the "
                    "folder of one dataset at a time"
                )
            if len(set(found)) < len(found):
                raise DataError(f"{file} has a duplicate column: {found}; give each column its own name")
            names = found
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            facts["rows"].append([group.num_rows for group in groups])
            for rows, size in ((group.num_rows, group.total_byte_size) for group in groups):
                facts["bytes"] += size
                row_bytes = size // max(1, rows)
                if size - row_bytes > facts["surplus"]:
                    facts |= {"surplus": size - row_bytes, "row_bytes": row_bytes}
        return facts | {"names": names or []}

    def __len__(self) -> int:
        return self.rows

    def read_footer(self, number: int) -> pq.FileMetaData:
        """The footer of a file. Raises DataError."""
        return _metadata(self.files[number])

    def local(self, number: int) -> Path:
        """A file on this machine."""
        return self.files[number]

    def column(self, name: str) -> list[Any]:
        values: list[Any] = []
        for file in self.files:
            with pq.ParquetFile(file, memory_map=True) as opened:
                try:
                    table = opened.read(columns=[name], use_threads=False)
                except UNREADABLE as error:
                    raise _damage(opened, file, [name], error) from error
                values += plain(table[name])
        return values

    def cells(self, row: int, names: Sequence[str]) -> list[Any]:
        group = bisect_right(self._starts, row) - 1
        table = self._table(group, tuple(names))
        place = row - self._starts[group]
        return [plain(table[name].slice(place, 1))[0] for name in names]

    def _table(self, group: int, names: tuple[str, ...]) -> pa.Table:
        key = (group, names)
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        number = self._file(group)
        # The file is opened anew: open handles do not survive a fork into loader workers, and neither does pyarrow's
        # thread pool. What takes long about it is parsing the footer, and that does survive.
        local = self.local(number)
        with pa.memory_map(str(local)) as source:
            file = pq.ParquetFile(source, metadata=self._footer(number))
            table = _read_group(file, local, group - self._first_groups[number], list(names))
        self._memory[key] = table
        self._memory_bytes += table.nbytes
        while len(self._memory) > 1 and self._memory_bytes > MEMORY_BYTES:
            self._memory_bytes -= self._memory.popitem(last=False)[1].nbytes
        return table

    def _footer(self, number: int) -> pq.FileMetaData:
        """The parsed footer of a file: parsing one takes longer than reading a row."""
        if number in self._footers:
            self._footers.move_to_end(number)
            return self._footers[number]
        footer = self._footers[number] = _metadata(self.local(number))
        self._footer_bytes += footer.serialized_size
        while len(self._footers) > 1 and self._footer_bytes > FOOTER_BYTES:
            self._footer_bytes -= self._footers.popitem(last=False)[1].serialized_size
        return footer

    def read_all(self) -> None:
        """Read everything once. Raises DataError for a row group that is damaged."""
        for file in self.files:
            with pq.ParquetFile(file, memory_map=True) as opened:
                for group in range(opened.num_row_groups):
                    _read_group(opened, file, group, opened.schema_arrow.names)

    def place(self, row: int) -> tuple[int, int]:
        """The number of a row's file, and its place in it."""
        number = self._file(bisect_right(self._starts, row) - 1)
        return number, row - self._starts[self._first_groups[number]]

    def blocks(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """The file and the row group of each of some rows."""
        groups = np.searchsorted(np.array(self._starts), np.asarray(rows), side="right") - 1
        return [(self._file(group), group) for group in groups.tolist()]

    def _file(self, group: int) -> int:
        """The number of a row group's file."""
        return bisect_right(self._first_groups, group) - 1

    def where(self, row: int) -> str:
        number, at = self.place(row)
        return f"{self.files[number].name} row {at}"

    def fault(self, row: int) -> str | None:
        return None

    def base(self, row: int) -> Path | None:
        return self.files[self.place(row)[0]].parent

    def __getstate__(self) -> dict[str, Any]:
        return (
            self.__dict__
            | {"_memory": OrderedDict(), "_memory_bytes": 0}
            | {
                "_footers": OrderedDict(),
                "_footer_bytes": 0,
            }
        )


def open_parquet(files: Sequence[Path]) -> Columns:
    """The rows of the files, by whichever route gives single rows quickly."""
    direct = ParquetColumns(files)
    return direct if direct.surplus <= SURPLUS else _as_arrow(direct)


def _as_arrow(direct: ParquetColumns) -> Columns:
    """The same rows by way of Arrow files; the parquet files themselves where the disk has no room for these."""
    from datasets.exceptions import DatasetGenerationError

    from diffalign.data.formats.arrow import ArrowColumns, arrow_builder, free_cache_bytes, laid_out, lay_out

    builder = arrow_builder(direct.files)
    if not laid_out(builder):
        each = f"reading one row reads up to {direct.surplus >> 20} MB of its row group"
        hint = f"write parquet with row_group_size={1 + SURPLUS // max(1, direct.row_bytes)} to avoid both"
        if free_cache_bytes(builder) < 1.1 * direct.bytes:
            log.warning(
                "%s, which is slow, and the disk of %s does not have the %.1f GB for an Arrow copy; set "
                "HF_DATASETS_CACHE to another folder, or %s",
                *(each, builder.cache_dir, direct.bytes / 2**30, hint),
            )
            return direct
        log.warning(
            "%s: converting the rows once to Arrow files in %s (%.1f GB; HF_DATASETS_CACHE moves it; %s)",
            *(each, builder.cache_dir, direct.bytes / 2**30, hint),
        )
    try:
        rows = lay_out(builder)
    except DatasetGenerationError as error:
        direct.read_all()  # names the file and row group, where one is damaged
        raise DataError(
            f"{direct.storage} cannot be converted to Arrow files in {builder.cache_dir} ({error.__cause__ or error}); "
            "free some space, or set HF_DATASETS_CACHE to another folder"
        ) from error
    return ArrowColumns(rows, storage=direct.storage, where=direct.where, files=direct.files)


def _read_group(opened: pq.ParquetFile, file: Path, group: int, names: list[str]) -> pa.Table:
    """A row group. Raises DataError for one that is damaged."""
    try:
        return opened.read_row_group(group, columns=names, use_threads=False)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{file}: row group {group} of {opened.num_row_groups} is damaged ({reason}); download the file again"
        ) from error


def _damage(opened: pq.ParquetFile, file: Path, names: list[str], error: Exception) -> DataError:
    """The error for a file that does not read, with the row group where it can be found."""
    try:
        for group in range(opened.num_row_groups):
            _read_group(opened, file, group, names)
    except DataError as found:
        return found
    return DataError(f"{file}: {names} cannot be read ({error}); download the file again")


def _metadata(file: Path) -> pq.FileMetaData:
    try:
        metadata = pq.read_metadata(file)
        metadata.schema.to_arrow_schema()
        return metadata
    except UNREADABLE as error:
        with open(file, "rb") as opened:
            if (instead := stand_in(opened.read(64))) is not None:
                raise DataError(f"{file}: {instead}") from error
        raise DataError(f"{file} is not a readable parquet file ({error}); download it again") from error


def write_rows(file: Path, schema: Mapping[str, pa.DataType], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as a file, of which a few are in memory at a time; the file appears complete or not at all."""
    names, rest = pa.schema(dict(schema)), iter(rows)
    with written_whole(file) as partial, pq.ParquetWriter(partial, names) as writer:
        while group := list(islice(rest, PAIRS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist([dict(row) for row in group], names))
