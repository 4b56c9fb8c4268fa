"""Tar shards that are cut off, and members of the wrong kind."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from diffalign.data.row import DataError
from diffalign.data.table.open import open_pairs
from tests.data.helpers import png, write_tar

BLOCK = tarfile.BLOCKSIZE


def shard(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


def end_of(file: Path, member: int) -> int:
    with tarfile.open(file) as tar:
        last = tar.getmembers()[member]
        return last.offset_data + -(-last.size // BLOCK) * BLOCK


def test_a_cut_anywhere_is_named_with_the_last_member(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "0.tar", 3).read_bytes()
    between = end_of(tmp_path / "0.tar", 6)  # after 000001.jpg_1.jpg: the third sample is gone, and so is a label
    for end in (between, between + 100, between + BLOCK, between + BLOCK + 3):
        (tmp_path / "0.tar").write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"0.tar .*cut short.*after its member '00000\d\..*download it again"):
            open_pairs(tmp_path)


def test_a_damaged_header_and_a_second_archive_are_told(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "0.tar", 3)
    whole, place = file.read_bytes(), end_of(file, 3)
    file.write_bytes(whole[:place] + b"\xff" * BLOCK + whole[place + BLOCK :])
    with pytest.raises(
        DataError, match=r"0.tar has a damaged member after its member '000000.label_0.txt' \(byte \d+\)"
    ):
        open_pairs(file)
    file.write_bytes(whole + whole)
    with pytest.raises(DataError, match=r"0.tar continues after the end mark .*name them one by one, or repack them"):
        open_pairs(file)


@pytest.mark.parametrize(
    ("member", "data", "reason"),
    [
        ("1.original_prompt.txt", b"caf\xe9", "1.original_prompt.txt is not UTF-8 (byte 0xe9); save it as UTF-8"),
        ("1.label_0.txt", b"\xff", "1.label_0.txt is not UTF-8 (byte 0xff); save it as UTF-8"),
        ("1.txt", b"a" * 70_000, "1.txt has 70000 bytes; a string has at most 65536"),
        ("1.jpg_0.png", png(9), "has two members for jpg_0 (the second is 1.jpg_0.png)"),
    ],
)
def test_a_member_that_cannot_be_used_is_one_bad_row(tmp_path: Path, member: str, data: bytes, reason: str) -> None:
    rows = {
        f"{i}.{name}": value
        for i in range(3)
        for name, value in {
            "original_prompt.txt": b"\xef\xbb\xbfa fox",
            "jpg_0.jpg": png(2 * i),
            "jpg_1.jpg": png(2 * i + 1),
            "label_0.txt": b"1",
        }.items()
    }
    if member == "1.txt":
        rows = {name.replace("original_prompt.txt", "txt"): value for name, value in rows.items()}
    table = open_pairs(shard(tmp_path / "0.tar", rows | {member: data}))
    assert [(p.where, p.kind, p.reason) for p in table.problems] == [("0.tar sample 1", "bad row", reason)]
    assert table.prompts == ["a fox", "a fox"]


def test_shards_of_one_name_in_two_folders_are_not_mixed(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", 2)
    assert len(open_pairs(tmp_path)) == 4
