"""Splits by the names of files and folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.data.formats.splits import of_split
from diffalign.data.row import DataError
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from tests.data.helpers import pick_rows, write_jsonl, write_parquet

PICKAPIC = [
    f"data/{name}-00000-of-0000{n}.parquet"
    for name, n in (("train", 1), ("validation", 1), ("validation_unique", 1), ("test", 2), ("test_unique", 1))
]


@pytest.mark.parametrize(
    ("files", "split", "wanted"),
    [
        (PICKAPIC, "train", ["data/train-00000-of-00001.parquet"]),
        (PICKAPIC, "validation", ["data/validation-00000-of-00001.parquet"]),
        (PICKAPIC, "validation_unique", ["data/validation_unique-00000-of-00001.parquet"]),
        (PICKAPIC, "test_unique", ["data/test_unique-00000-of-00001.parquet"]),
        (["Train-0.tar", "Test-0.tar"], "train", ["Train-0.tar"]),
        (["Train-0.tar", "Test-0.tar"], "Test", ["Test-0.tar"]),
        (["training.jsonl", "testing.jsonl", "holdout.jsonl"], "train", ["training.jsonl"]),
        (["training.jsonl", "testing.jsonl", "holdout.jsonl"], "test", ["testing.jsonl"]),
        (["training.jsonl", "testing.jsonl", "holdout.jsonl"], "holdout", ["holdout.jsonl"]),
        (["a.train.jsonl", "a.val.jsonl"], "validation", ["a.val.jsonl"]),
        (["train/0.tar", "train/1.tar", "held_out/0.tar"], "train", ["train/0.tar", "train/1.tar"]),
        (["train_prefs-0.parquet", "test_prefs-0.parquet"], "train", ["train_prefs-0.parquet"]),
        (["train_prefs-0.parquet", "test_prefs-0.parquet"], "train_prefs", ["train_prefs-0.parquet"]),
        (["a.parquet", "b.parquet"], "train", ["a.parquet", "b.parquet"]),
        (["trainer.parquet", "latest.parquet"], "train", ["trainer.parquet", "latest.parquet"]),
        (["winter.parquet", "summer.parquet"], "winter", ["winter.parquet"]),
    ],
)
def test_files_of_a_split(files: list[str], split: str, wanted: list[str]) -> None:
    folder = Path("/data")
    found = of_split([folder / file for file in files], folder, split)
    assert [str(file.relative_to(folder)) for file in found] == wanted


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (
            PICKAPIC,
            "dev",
            r"no files of split 'dev'; it has \['test', 'test_unique', 'train', 'validation', 'val.*: set split",
        ),
        (
            ["holdout.jsonl"],
            "train",
            r"no files of split 'train'; it has \['holdout'\]: set split to one of these",
        ),
        (["Testing-0.tar"], "train", r"it has \['testing'\]"),
        (["val-0.tar", "valid-0.tar"], "validation", r"it has \['val', 'valid'\]"),
        (
            ["train_test.jsonl"],
            "train",
            r"train_test.jsonl: its name contains the splits \['test', 'train'\]; rename it",
        ),
        (["a.tar"], "test", "has no splits, and split 'test' was requested; remove split"),
    ],
)
def test_a_split_that_is_not_there(files: list[str], split: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        of_split([Path("/data") / file for file in files], Path("/data"), split)


def test_shards_of_a_split_are_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pick_rows(5)
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows[:2])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows[2:4])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows[4:])
    write_parquet(tmp_path / "more.parquet", rows[4:])
    assert open_pairs(tmp_path).ids == ["a0:b0", "a1:b1", "a2:b2", "a3:b3"]
    assert "left out, since their names contain no split and others' do: ['more.parquet']" in caplog.text
    assert open_pairs(tmp_path, DataSpec(split="test")).ids == ["a4:b4"]
    assert open_pairs(tmp_path)[3].where == "train-00001-of-00002.parquet row 1"


def test_a_split_is_not_invented(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", 2)
    assert len(open_pairs(file)) == 2
    for place in (file, tmp_path):
        with pytest.raises(DataError, match="has no splits, and split 'test' was requested"):
            open_pairs(place, DataSpec(split="test"))


def test_a_saved_data_set_without_splits_has_none(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(pick_rows(1)).save_to_disk(tmp_path / "saved")
    assert len(open_pairs(tmp_path / "saved")) == 1
    with pytest.raises(DataError, match="without splits, and split 'test' was requested"):
        open_pairs(tmp_path / "saved", DataSpec(split="test"))
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(
        DataError, match=r"saved is not a complete dataset of save_to_disk \(.*\); save or copy it again"
    ):
        open_pairs(tmp_path / "saved")
