"""Parquet: which files are read directly and which through an Arrow copy, and the memory that reading takes."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from diffalign.data.formats import parquet
from diffalign.data.row import DataError
from diffalign.data.table.open import open_pairs
from tests.data.helpers import pick_rows, png, write_parquet


@pytest.mark.usefixtures("arrow")
def test_large_row_groups_are_read_through_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "pairs.parquet", pick_rows(4))
    through = open_pairs(file)
    monkeypatch.setattr(parquet, "SURPLUS", 1 << 20)
    direct = open_pairs(file)
    assert type(through.columns).__name__ == "ArrowColumns"
    pictures = [
        [(row.chosen.open().tobytes(), row.rejected.open().tobytes()) for row in (table[i] for i in range(4))]
        for table in (through, direct)
    ]
    assert pictures[0] == pictures[1]
    assert through[2].where == direct[2].where == "pairs.parquet row 2"
    assert through.identity == direct.identity


@pytest.mark.usefixtures("arrow")
def test_what_is_read_beside_a_row_decides_the_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the size of the group: one large pair per group leaves nothing to save."""
    rows = [row | {"jpg_0": png(i, (64, 64)), "jpg_1": png(i + 9, (64, 64))} for i, row in enumerate(pick_rows(4))]
    monkeypatch.setattr(parquet, "SURPLUS", 3 * len(png(0, (64, 64))))  # one and a half pairs
    for size, route in ((1, "ParquetColumns"), (2, "ParquetColumns"), (4, "ArrowColumns")):
        stored = parquet.open_parquet([write_parquet(tmp_path / f"{size} [a].parquet", rows, size)])
        assert type(stored).__name__ == route, size
        assert stored.cells(3, ["jpg_0", "jpg_1"]) == [rows[3]["jpg_0"], rows[3]["jpg_1"]]


@pytest.mark.usefixtures("arrow")
def test_without_room_for_an_arrow_copy_parquet_is_read_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = {"bytes": 1000}
    monkeypatch.setattr("diffalign.data.formats.arrow.free_cache_bytes", lambda builder: room["bytes"])
    file = write_parquet(tmp_path / "pairs.parquet", pick_rows(4))
    assert type(parquet.open_parquet([file])).__name__ == "ParquetColumns"
    assert "does not have the" in caplog.text
    assert "row_group_size=1 to avoid both" in caplog.text
    room["bytes"] = 1 << 30
    parquet.open_parquet([file])
    room["bytes"] = 1000
    caplog.clear()
    assert type(parquet.open_parquet([file])).__name__ == "ArrowColumns"  # the copy is there: no room is needed
    assert caplog.text == ""


def test_a_footer_is_parsed_once_as_long_as_footers_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_parquet(tmp_path / f"{name}.parquet", pick_rows(9), row_group_size=1) for name in "ab"]
    stored = parquet.ParquetColumns(files)
    parsed = []
    real = pq.read_metadata
    monkeypatch.setattr(pq, "read_metadata", lambda file: parsed.append(file) or real(file))
    assert [stored.cells(row, ["jpg_0"]) for row in range(18)] == 2 * [[png(2 * i)] for i in range(9)]
    assert parsed == files
    assert [stored.cells(row, ["jpg_1"]) for row in (0, 9, 1, 10)] == [[png(2 * i + 1)] for i in (0, 0, 1, 1)]
    assert parsed == files
    monkeypatch.setattr(parquet, "FOOTER_BYTES", 1)
    stored = parquet.ParquetColumns(files)
    parsed.clear()
    for row in (0, 9, 1, 10):
        stored.cells(row, ["jpg_1"])
    assert parsed == files * 2
    assert len(stored._footers) == 1


def test_parquet_keeps_a_bounded_number_of_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MEMORY_BYTES", 5 * len(png(0)))  # two groups of one row of two images
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", pick_rows(9), row_group_size=1))
    assert isinstance(table.columns, parquet.ParquetColumns)
    assert len(table.columns._memory) == 2
    assert table.columns._memory_bytes == sum(kept.nbytes for kept in table.columns._memory.values())


def damaged(file: Path, column: str, group: int) -> Path:
    """The same file with the pages of one column of one row group overwritten."""
    found = pq.ParquetFile(file)
    place = found.schema_arrow.names.index(column)
    chunk = found.metadata.row_group(group).column(place)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    raw = bytearray(file.read_bytes())
    raw[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    file.write_bytes(raw)
    return file


@pytest.mark.parametrize("column", ["caption", "jpg_0"])
def test_a_damaged_page_names_file_and_row_group(tmp_path: Path, column: str) -> None:
    write_parquet(tmp_path / "a.parquet", pick_rows(6))
    damaged(write_parquet(tmp_path / "b.parquet", pick_rows(6)), column, 1)
    with pytest.raises(DataError, match=r"b.parquet: row group 1 of 2 is damaged \(.*\); download the file again"):
        open_pairs(tmp_path)


def test_a_damaged_page_is_named_when_an_arrow_copy_is_made(tmp_path: Path, arrow: None) -> None:
    damaged(write_parquet(tmp_path / "b.parquet", pick_rows(6)), "jpg_0", 1)
    with pytest.raises(DataError, match=r"b.parquet: row group 1 of 2 is damaged"):
        open_pairs(tmp_path)
