"""Hugging Face data sets: from the Hub, saved with `save_to_disk`, or parquet laid out as Arrow files."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from glob import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.formats.arrow_values import plain
from diffalign.data.formats.columns import Columns, ListColumns
from diffalign.data.row import DataError, to_rgb
from diffalign.io.hub import why_not_fetched
from diffalign.io.progress import Progress

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder


class ArrowColumns:
    """Rows of a `datasets.Dataset`: memory-mapped, images still encoded."""

    in_memory = False

    def __init__(
        self, dataset: Dataset, *, storage: str, where: Callable[[int], str], files: Sequence[Path] | None = None
    ) -> None:
        """files: what the data set was made of, where it is a copy; None: the data set's own."""
        from datasets import Image

        for name, feature in dataset.features.items():
            if isinstance(feature, Image):
                dataset = dataset.cast_column(name, Image(decode=False))
        self.dataset, self.storage, self.where = dataset, storage, where
        picked = dataset._indices is not None  # rows of the files, which these do not tell
        own = [] if picked else [Path(file["filename"]) for file in dataset.cache_files]
        self.files = own if files is None else files
        self.names = tuple(dataset.column_names)
        self._views: dict[tuple[str, ...], Dataset] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def column(self, name: str) -> list[Any]:
        return plain(self.dataset.select_columns([name]).with_format("arrow")[:][name])

    def cells(self, row: int, names: Sequence[str]) -> list[Any]:
        key = tuple(dict.fromkeys(names))
        if key not in self._views:
            self._views[key] = self.dataset.select_columns(list(key))
        values = self._views[key][row]
        return [values[name] for name in names]

    def fault(self, row: int) -> str | None:
        return None

    def base(self, row: int) -> Path | None:
        return None  # `datasets` itself wrote the paths


class DatasetRow:
    """Names rows as "data set row 7", counted from 0 as `dataset[7]` does."""

    def __call__(self, row: int) -> str:
        return f"dataset row {row}"


class SplitRow:
    """Names rows as "split 'train' row 7" (a class, so that a table can be sent to loader workers)."""

    def __init__(self, split: str) -> None:
        self.split = split

    def __call__(self, row: int) -> str:
        return f"split {self.split!r} row {row}"


def arrow_builder(files: Sequence[Path]) -> DatasetBuilder:
    """The builder of one memory-mapped data set of parquet files, once, in the Hugging Face cache."""
    from datasets import load_dataset_builder

    return load_dataset_builder("parquet", data_files={"train": [escape(str(file)) for file in files]})


def laid_out(builder: DatasetBuilder) -> bool:
    """Whether the data set is in the cache already."""
    return Path(builder.cache_dir, "dataset_info.json").is_file()


def free_cache_bytes(builder: DatasetBuilder) -> int:
    """Room on the disk that the data set would be written to."""
    place = Path(builder.cache_dir)
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def lay_out(builder: DatasetBuilder) -> Dataset:
    """The data set, made if it is not there."""
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


def object_columns(rows: Any) -> Columns:
    """Rows of a `datasets.Dataset` or IterableDataset, a torch data set, or a list of dictionaries.

    Images may be paths, bytes or PIL images. All but a `datasets.Dataset` are read into memory, a stream to its end:
    a run visits pairs in a seeded order, epoch after epoch, and continues where it was killed.
    Raises DataError for anything else, for a DatasetDict without a split, and for a row that is no dictionary.
    """
    from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict
    from torch.utils.data import Dataset as TorchDataset

    if isinstance(rows, Dataset):
        if rows.format["type"] == "custom":
            raise DataError(
                "the data set has a transform (set_transform, with_transform), which is not applied to columns that "
                "are read at once; apply it with `map`, or give dataset.with_format(None)"
            )
        return ArrowColumns(rows, storage="data set", where=DatasetRow())
    if isinstance(rows, DatasetDict | IterableDatasetDict):
        raise DataError(f"a DatasetDict has several splits; give one of them: dataset[{next(iter(rows), 'train')!r}]")
    if isinstance(rows, IterableDataset):
        for name, feature in (rows.features or {}).items():
            if isinstance(feature, Image):  # else every image would be decoded, and encoded again
                rows = rows.cast_column(name, Image(decode=False))
    elif not isinstance(rows, list | TorchDataset):
        raise DataError(
            f"pairs cannot be read from {type(rows).__module__}.{type(rows).__name__}; give a path, a Hub id, a data "
            "set of datasets or torch, or a list of dictionaries with prompt, chosen and rejected"
        )
    read = [_row(number, row) for number, row in enumerate(_each(rows))]
    return ListColumns(read, [f"row {i}" for i in range(len(read))], storage="list of rows", base=None)


def _each(rows: Any) -> Iterable[Any]:
    """The rows in order; a torch data set without an iterator is asked for each number below its length."""
    known = len(rows) if hasattr(rows, "__len__") else None
    found = rows if hasattr(rows, "__iter__") or known is None else (rows[i] for i in range(known))
    return Progress(found, total=known, desc="reading rows", unit=" rows", delay=3.0)


def _row(number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"row {number} is {type(row).__name__}; a row is a dictionary with prompt, chosen and rejected")
    return {name: _encoded(value) for name, value in row.items()}


def _encoded(value: Any) -> Any:
    """A PIL image, alone or in a list, as the PNG of what its file would be read as; anything else as it is.

    One that does not decode becomes bytes that are no image, so that its row is left out by name.
    """
    from PIL import Image, ImageOps

    if isinstance(value, list | tuple) and any(isinstance(each, Image.Image) for each in value):
        return [_encoded(each) for each in value]
    if not isinstance(value, Image.Image):
        return value
    try:
        image = to_rgb(ImageOps.exif_transpose(value))
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return f"no image: {error}".encode()
    with BytesIO() as file:
        image.save(file, format="PNG", compress_level=1)
        return file.getvalue()


def open_saved(folder: Path, split: str) -> ArrowColumns:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:  # of a state.json or an Arrow file that is damaged
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{folder} is not a complete dataset of save_to_disk ({reason}); save or copy it again"
        ) from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise missing_split(str(folder), split, list(found))
        found = found[split]
    elif split not in ("train", str(found.split)):
        raise DataError(f"{folder} is a dataset without splits, and split {split!r} was requested; remove the split")
    return ArrowColumns(found, storage=f"saved dataset {folder.name}", where=SplitRow(split))


def open_hub(name: str, split: str) -> ArrowColumns:
    """A data set of the Hugging Face Hub, downloaded to its cache."""
    from datasets import get_dataset_split_names, load_dataset

    try:
        dataset = load_dataset(name, split=split)
    except Exception as error:  # `datasets` raises its own, huggingface_hub's, requests' and plain ones
        if "split" in str(error).lower():
            try:
                splits = get_dataset_split_names(name)
            except Exception:
                splits = []
            if splits and split not in splits:
                raise missing_split(name, split, splits) from error
        raise DataError(
            f"there is no file or folder {name!r} here, and as a dataset: {why_not_fetched(name, error, 'dataset')}"
        ) from error
    return ArrowColumns(dataset, storage=f"Hub dataset {name}", where=SplitRow(split))


def missing_split(name: str, split: str, splits: Sequence[str]) -> DataError:
    """The error for a split that is not there."""
    near = difflib.get_close_matches(split, splits, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return DataError(f"{name} has no split {split!r}; it has {sorted(splits)}{hint}")
