"""Image files belong to the identity of a data set by their contents, and are read no more often than needed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from diffalign.data.spec import DataSpec
from diffalign.data.table import file_hash as content
from diffalign.data.table.open import open_pairs
from tests.data.helpers import pick_rows, png, write_jsonl, write_parquet


@pytest.mark.parametrize("extra", [{}, {"uid": "pair"}])
def test_identity_covers_the_contents_of_image_files(tmp_path: Path, extra: dict[str, str]) -> None:
    """One bit, at the same file size and time: noticed, with and without ids, however the images are verified."""
    (tmp_path / "a").mkdir()
    file = write_jsonl(tmp_path / "a" / "pairs.jsonl", 3, **extra)
    image = tmp_path / "a" / "images" / "1c.png"
    before, old, times = open_pairs(file).identity, image.read_bytes(), image.stat()
    image.write_bytes(old[:-30] + bytes([old[-30] ^ 1]) + old[-29:])
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_pairs(file, DataSpec(verify="none")).identity != before
    image.write_bytes(old)
    os.utime(image, ns=(1, 1))
    assert {open_pairs(file, DataSpec(verify=each)).identity for each in ("none", "header", "full")} == {before}
    copy = shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert open_pairs(copy / "pairs.jsonl").identity == before


def test_files_are_hashed_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = content._hash_file
    monkeypatch.setattr(content, "_hash_file", lambda ref: hashed.append(Path(str(ref.path)).name) or real(ref))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    file = write_jsonl(tmp_path / "pairs.jsonl", 2)
    lines = file.read_text()
    file.write_text(lines + lines.splitlines()[0].replace("0r", "1r"))  # two files again
    everything = ["0c.png", "0r.png", "1c.png", "1r.png"]
    first = open_pairs(file).identity
    assert sorted(hashed) == everything
    open_pairs(file).identity  # noqa: B018
    assert len(hashed) == 8  # files written this moment may change within one tick of the clock: not remembered
    monkeypatch.setattr(content, "SETTLED", -60.0)
    assert {open_pairs(file).identity for _ in range(3)} == {first}
    assert len(hashed) == 12
    (tmp_path / "images" / "1r.png").write_bytes(png(7))
    assert open_pairs(file).identity != first
    assert sorted(hashed[12:]) == everything
    assert len(list((tmp_path / "home" / "diffalign" / "contents").iterdir())) == 2


def test_identity_without_a_place_to_remember(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(content, "SETTLED", -60.0)
    (tmp_path / "home").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    file = write_jsonl(tmp_path / "pairs.jsonl", 1)
    assert open_pairs(file).identity == open_pairs(file).identity
    assert "cannot be stored" in caplog.text


def test_parquet_uids_are_trusted_however_images_are_verified(tmp_path: Path) -> None:
    """Parquet rows that name files: with uids the files are not part of the identity, without them they are."""
    write_jsonl(tmp_path / "unused.jsonl", 3)
    for uids, trusted in ((True, True), (False, False)):
        rows = [row | {"jpg_0": f"images/{i}c.png", "jpg_1": f"images/{i}r.png"} for i, row in enumerate(pick_rows(3))]
        if not uids:
            rows = [{name: value for name, value in row.items() if "uid" not in name} for row in rows]
        file = write_parquet(tmp_path / "pairs.parquet", rows)
        identities = {open_pairs(file, DataSpec(verify=each)).identity for each in ("none", "header", "full")}
        assert len(identities) == 1
        image = tmp_path / "images" / "1c.png"
        old = image.read_bytes()
        image.write_bytes(png(77))
        assert ({open_pairs(file).identity} == identities) == trusted
        image.write_bytes(old)
