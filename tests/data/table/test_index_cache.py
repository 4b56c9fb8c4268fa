"""A large data set is examined once: the result is cached, and computed again after any change."""

from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk

from diffalign.data.formats import parquet
from diffalign.data.row import DataError, ImageRef
from diffalign.data.spec import DataSpec
from diffalign.data.table import file_hash as content
from diffalign.data.table import index_cache as remembered
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from tests.data.helpers import pick_rows, png, write_jsonl, write_parquet, write_tar


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own; small data count as large, and files written this moment as settled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remembered, "FROM_ROWS", 2)
    monkeypatch.setattr(content, "SETTLED", -60.0)
    return tmp_path / "home" / "diffalign" / "tables"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Images whose headers were read."""
    seen: list[str] = []
    real = ImageRef.size
    monkeypatch.setattr(ImageRef, "size", lambda ref: seen.append(ref.where) or real(ref))
    return seen


def rows(n: int = 7) -> list[dict[str, Any]]:
    """Pairs with scores, weights and prompts in common; one without an image, one twice, one tie."""
    made = [{**row, "score_0": 0.25 * i, "score_1": 1.0, "weight": 1.0 + i} for i, row in enumerate(pick_rows(n))]
    made[2]["jpg_0"] = b""
    made[4] |= {"image_0_uid": "a0", "image_1_uid": "b0"}
    made[5] |= {"label_0": 0.5, "label_1": 0.5}
    return made


def facts(table: PairTable) -> list[Any]:
    """Everything a table says without an image."""
    pairs = range(len(table))
    return [
        *(
            table.total_rows,
            table.index.examined_rows,
            table.problems,
            table.ids,
            table.prompts,
            table.sizes,
            table.ties,
        ),
        *(table.identity, table.terms, table.negative_masks),
        [(table.where(i), table.scores(i), table.tie(i), table.number("weight", i)) for i in pairs],
        [(table[i].chosen.read(), table[i].rejected.read()) for i in pairs],
    ]


def stored(kind: str, folder: Path) -> Path:
    """The rows in a storage that holds its images."""
    if kind == "parquet":
        return write_parquet(folder / "pairs.parquet", rows())
    if kind == "tar":
        return write_tar(folder / "pairs.tar", 5)
    Dataset.from_list(rows()).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("kind", ["parquet", "tar", "saved"])
@pytest.mark.parametrize("ties", [False, True])
def test_the_second_start_looks_at_no_image(
    kind: str, ties: bool, tmp_path: Path, looks: list[str], home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = stored(kind, tmp_path)
    first = open_pairs(data, DataSpec(keep_ties=ties))
    assert len(looks) >= 2 * len(first) > 0
    looks.clear()
    caplog.set_level(logging.INFO)
    second = open_pairs(data, DataSpec(keep_ties=ties))
    assert looks == []
    assert facts(second) == facts(first)
    assert facts(pickle.loads(pickle.dumps(second))) == facts(first)
    assert "examined earlier" in caplog.text
    assert len(list(home.iterdir())) == 1
    first.leave_out("test", {0: "why not"})
    second.leave_out("test", {0: "why not"})
    assert facts(second) == facts(first)


@pytest.mark.usefixtures("arrow")
def test_a_copy_is_known_by_what_it_was_made_of(
    tmp_path: Path, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parquet laid out as Arrow files this very moment: it is the parquet file that has been there for a while."""
    data = stored("parquet", tmp_path)
    os.utime(data, ns=(1, 1))
    monkeypatch.setattr(content, "SETTLED", 2.0)
    monkeypatch.setattr(content.time, "time_ns", lambda: data.stat().st_ctime_ns + 2_001_000_000)
    first = open_pairs(data)
    assert type(first.columns).__name__ == "ArrowColumns"
    assert looks
    looks.clear()
    assert facts(open_pairs(data)) == facts(first)
    assert looks == []


def test_other_settings_and_changed_files_are_looked_at(tmp_path: Path, looks: list[str]) -> None:
    data = stored("parquet", tmp_path)
    settings: list[dict[str, Any]] = [
        {},
        {"invert_preference": True},
        {"max_pairs": 3},
        {"keep_ties": True},
        {"columns": {"weight": ""}},
    ]
    for each in settings:
        looks.clear()
        table = open_pairs(data, DataSpec(**each))
        assert len(looks) >= 2 * len(table) > 0, each
    looks.clear()
    os.utime(data, ns=(1, 1))
    open_pairs(data)
    assert looks
    changed = rows()
    changed[0]["caption"] = "another"
    write_parquet(data, changed)
    assert open_pairs(data).prompts[0] == "another"


def test_names_are_settings_too(tmp_path: Path) -> None:
    """Rows with two prompts always look the same from outside; which columns they come from is all the difference."""
    made = [
        {**{f"image_{side}": png(2 * i + side) for side in (0, 1)}, "short_0": "cat", "short_1": "dog"}
        | {"long_0": f"a cat, number {i}", "long_1": f"a dog, number {i}"}
        for i in range(3)
    ]
    data = write_parquet(tmp_path / "pairs.parquet", made)
    for words, expected in (("short", "cat"), ("long", "a cat, number 0")):
        columns = {f"prompt_{side}": f"{words}_{side}" for side in (0, 1)}
        for _ in range(2):
            assert open_pairs(data, DataSpec(format="two_prompts", columns=columns)).prompts[0] == expected


def test_a_slice_of_a_hub_data_set_has_its_own_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves lie in the same files and have the same number of rows."""
    Dataset.from_list(pick_rows(6, prompts=6)).save_to_disk(str(tmp_path / "saved"))
    whole = load_from_disk(str(tmp_path / "saved"))
    halves = {"train[:50%]": whole.select(range(3)), "train[50%:]": whole.select(range(3, 6))}
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: halves[split])
    for _ in range(2):
        assert open_pairs("someone/pairs", DataSpec(split="train[:50%]")).prompts == [
            "prompt 0",
            "prompt 1",
            "prompt 2",
        ]
        assert open_pairs("someone/pairs", DataSpec(split="train[50%:]")).prompts == [
            "prompt 3",
            "prompt 4",
            "prompt 5",
        ]


def test_another_version_looks_for_itself(tmp_path: Path, looks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = stored("parquet", tmp_path)
    open_pairs(data)
    monkeypatch.setattr(remembered, "_code", lambda: "another")
    looks.clear()
    open_pairs(data)
    assert looks


def test_rows_that_name_files_are_looked_at_every_time(tmp_path: Path, looks: list[str], home: Path) -> None:
    """Nothing of the storage changes when such a file does."""
    listing = write_jsonl(tmp_path / "pairs.jsonl", 3)
    named = [json.loads(line) for line in listing.read_text().splitlines()]
    for data in (listing, write_parquet(tmp_path / "pairs.parquet", named)):
        for _ in range(2):
            looks.clear()
            open_pairs(data)
            assert len(looks) == 6
    assert not home.exists()


def test_a_damaged_note_is_made_anew(tmp_path: Path, looks: list[str], home: Path) -> None:
    data = stored("parquet", tmp_path)
    expected = facts(open_pairs(data))
    (note,) = home.iterdir()
    whole = note.read_bytes()
    flipped = whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]  # a label, a score or a text: it opens
    for damaged in (b"", whole[:-40], png(1), flipped):
        note.write_bytes(damaged)
        looks.clear()
        assert facts(open_pairs(data)) == expected
        assert looks
        assert note.read_bytes() == whole


def test_an_index_is_hashed_once_and_again_after_a_change(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = stored("parquet", tmp_path)
    expected, hashed = facts(open_pairs(data)), []
    real = remembered.stamp_fault
    monkeypatch.setattr(remembered, "stamp_fault", lambda note: hashed.append(note) or real(note))
    (note,) = home.iterdir()
    for times in (1, 1):
        assert facts(open_pairs(data)) == expected
        assert len(hashed) == times
    note.write_bytes(note.read_bytes())
    assert facts(open_pairs(data)) == expected
    assert len(hashed) == 2


def test_footers_are_parsed_when_their_file_is_first_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MANY_GROUPS", 1)
    for number in range(3):
        write_parquet(tmp_path / f"pairs/train-{number}.parquet", rows())
    files = sorted((tmp_path / "pairs").iterdir())
    expected, parsed = facts(open_pairs(tmp_path / "pairs")), []
    real = parquet._metadata
    monkeypatch.setattr(parquet, "_metadata", lambda file: parsed.append(file.name) or real(file))
    table = open_pairs(tmp_path / "pairs")
    assert parsed == []
    assert table[len(table) - 1].chosen.read()
    assert parsed == ["train-2.parquet"]
    assert facts(table) == expected
    for note in (tmp_path / "home/diffalign/footers").iterdir():
        note.write_text(note.read_text().replace("7", "6"))  # fewer rows
    parsed.clear()
    assert facts(open_pairs(tmp_path / "pairs")) == expected
    assert len(parsed) >= 3
    write_parquet(files[1], rows()[:2])
    assert open_pairs(tmp_path / "pairs").total_rows == 16
    files[2].write_bytes(files[2].read_bytes()[:-9])
    with pytest.raises(DataError, match=r"train-2\.parquet is not a readable parquet file"):
        open_pairs(tmp_path / "pairs")


def test_small_data_and_young_files_have_no_note(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = stored("parquet", tmp_path)
    monkeypatch.setattr(content, "SETTLED", 60.0)
    open_pairs(data)
    monkeypatch.setattr(content, "SETTLED", -60.0)
    monkeypatch.setattr(remembered, "FROM_ROWS", 100)
    open_pairs(data)
    assert not home.exists()


def test_no_place_to_remember(tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    home.parent.parent.write_text("not a folder")
    data = stored("parquet", tmp_path)
    assert facts(open_pairs(data)) == facts(open_pairs(data))
    assert "every start examines the rows again" in caplog.text


def test_a_note_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(remembered.os, "replace", full)
    open_pairs(stored("parquet", tmp_path))
    assert list(home.iterdir()) == []
