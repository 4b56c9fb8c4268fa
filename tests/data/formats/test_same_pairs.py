"""The same pairs in ten layouts and objects give bit-identical batches."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import Dataset as TorchDataset

from diffalign.data.formats.arrow import object_columns
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.row import DataError
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.types import PairBatch
from tests.data.helpers import FakeEncoder, pick_rows, write_parquet
from tests.data.loader.test_offline_pairs import assert_same, joined

Rows = list[dict[str, Any]]


class Torch(TorchDataset[dict[str, Any]]):
    """A data set with a length and numbered rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def folder(place: Path, rows: Rows) -> Path:
    place.mkdir()
    write_parquet(place / "train-00000-of-00002.parquet", rows[:5])
    write_parquet(place / "train-00001-of-00002.parquet", rows[5:])
    return place


def files(place: Path, rows: Rows) -> Rows:
    """The rows with their images as files beside a listing."""
    place.mkdir()
    found = []
    for i, row in enumerate(rows):
        names = {f"jpg_{side}": f"{i}_{side}.png" for side in range(2)}
        for column, name in names.items():
            (place / name).write_bytes(row[column])
        found.append({**row, **names})
    return found


def jsonl(place: Path, rows: Rows) -> Path:
    lines = [json.dumps(row) for row in files(place, rows)]
    (place / "pairs.jsonl").write_text("\n".join(lines))
    return place / "pairs.jsonl"


def table(place: Path, rows: Rows) -> Path:
    listed = files(place, rows)
    with (place / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(listed[0]))
        writer.writeheader()
        writer.writerows(listed)
    return place / "pairs.csv"


def shard(place: Path, rows: Rows) -> Path:
    with tarfile.open(place.with_suffix(".tar"), "w") as file:
        for i, row in enumerate(rows):
            for column, value in row.items():
                ending = "png" if column.startswith("jpg") else "txt"
                data = value if isinstance(value, bytes) else str(value).encode()
                info = tarfile.TarInfo(f"{i:05d}.{column}.{ending}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return place.with_suffix(".tar")


def images(rows: Rows) -> Dataset:
    """As `datasets` has pairs: images that decode where they are asked for."""
    found = Dataset.from_list([{**row, **{f"jpg_{i}": {"bytes": row[f"jpg_{i}"], "path": None} for i in range(2)}}
                               for row in rows])  # fmt: skip
    return found.cast_column("jpg_0", ImageFeature()).cast_column("jpg_1", ImageFeature())


def saved(place: Path, rows: Rows) -> Path:
    images(rows).save_to_disk(str(place))
    return place


def opened(rows: Rows) -> Rows:
    return [{**row, **{f"jpg_{i}": Image.open(io.BytesIO(row[f"jpg_{i}"])) for i in range(2)}} for row in rows]


LAYOUTS: dict[str, Callable[[Path, Rows], Any]] = {
    "folder of parquet": folder,
    "jsonl": jsonl,
    "csv": table,
    "tar": shard,
    "save_to_disk": saved,
    "Dataset": lambda _, rows: object_columns(images(rows)),
    "IterableDataset": lambda _, rows: object_columns(images(rows).to_iterable_dataset(2)),
    "list": lambda _, rows: object_columns(rows),
    "list of PIL images": lambda _, rows: object_columns(opened(rows)),
    "torch": lambda _, rows: object_columns(Torch(rows)),
}


def batches(source: Any) -> list[PairBatch]:
    found = open_pairs(source)
    content = Online(FakeEncoder(), 16, center_crop=False, random_flip=True)
    return list(islice(OfflinePairs(found, content, LoaderSpec(3, 2, prompt_dropout=0.2)).batches(), 8))


def test_the_same_pairs_give_the_same_batches_to_the_bit(tmp_path: Path) -> None:
    rows = pick_rows(9)
    expected = batches(write_parquet(tmp_path / "pairs.parquet", rows))
    for name, write in LAYOUTS.items():
        found = batches(write(tmp_path / name.replace(" ", "_"), rows))
        assert [batch.ids for batch in found] == [batch.ids for batch in expected], name
        assert_same(joined(found), joined(expected))


def test_a_pil_image_is_read_as_its_file_would_be(tmp_path: Path) -> None:
    """Turned as EXIF says, any mode as RGB; one that does not decode is left out with its row's name."""
    noise = Image.effect_noise((40, 24), 80)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    noise.convert("CMYK").save(tmp_path / "cmyk.tif")
    (tmp_path / "cut.png").write_bytes(pick_rows(1)[0]["jpg_0"][:200])
    (other := Image.effect_noise((40, 24), 80)).save(tmp_path / "other.png")
    names = ("turned.jpg", "cmyk.tif", "cut.png")
    rows = [{"prompt": "p", "chosen": Image.open(tmp_path / name), "rejected": other} for name in names]
    files = [{"prompt": "p", "chosen": str(tmp_path / name), "rejected": str(tmp_path / "other.png")} for name in names]
    objects, paths = (open_pairs(object_columns(each), DataSpec(verify="full")) for each in (rows, files))
    assert len(objects) == len(paths) == 2
    assert objects.sizes == paths.sizes
    assert objects.sizes[0] == (24, 40)
    for index in range(2):
        assert objects[index].chosen.open().tobytes() == paths[index].chosen.open().tobytes()
    assert [problem.where for problem in objects.problems] == ["row 2"]


def test_a_transform_is_refused() -> None:
    with pytest.raises(DataError, match="the data set has a transform"):
        object_columns(images(pick_rows(2)).with_transform(lambda batch: batch))


def test_rows_that_are_none_and_splits_are_named() -> None:
    with pytest.raises(DataError, match="row 1 is tuple; a row is a dictionary"):
        object_columns(Torch([{"prompt": "a cat"}, ("a", "b")]))  # type: ignore[list-item]
    with pytest.raises(DataError, match="give one of them: dataset\\['test'\\]"):
        object_columns(DatasetDict({"test": images(pick_rows(2))}))
    with pytest.raises(DataError, match="cannot be read from builtins"):
        object_columns(row for row in pick_rows(2))
