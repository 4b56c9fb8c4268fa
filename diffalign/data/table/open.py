"""`open_pairs`: from a path or Hub id to usable pairs, whatever the format.

Storage (parquet, saved data set, Hub, listing, json, tar, folder) and column layout (Pick-a-Pic or preference)
are found separately, so every layout works in every storage.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from diffalign.data.formats import pickapic, preference, two_prompts
from diffalign.data.formats.columns import Columns
from diffalign.data.formats.hpdv2 import open_json
from diffalign.data.formats.image_folder import is_pair_folder, open_folder
from diffalign.data.formats.parquet import open_parquet
from diffalign.data.formats.pickapic import Layout
from diffalign.data.formats.rankings import NEEDED, PARTS, RankedColumns, has_pairs, ranked
from diffalign.data.formats.splits import has_no_splits, of_split
from diffalign.data.formats.text_files import SUFFIXES, open_listing
from diffalign.data.formats.webdataset import open_shards
from diffalign.data.remote_shards import RemoteParquet, open_remote
from diffalign.data.row import DataError
from diffalign.data.spec import AS_FOUND, DataSpec, is_remote
from diffalign.data.table.examine import examine
from diffalign.data.table.index_cache import FROM_ROWS, recall, remember, remembered_at
from diffalign.data.table.lists import open_lists
from diffalign.data.table.pairs import PairTable
from diffalign.data.weights import TERMS
from diffalign.io.paths import expanded

log = logging.getLogger(__name__)

FORMATS = ("auto", "pickapic", "preference", two_prompts.FORMAT)
_LAYOUTS = {"pickapic": pickapic, "preference": preference}
_PARTS = {**_LAYOUTS, two_prompts.FORMAT: two_prompts}
_STORED = (".parquet", *SUFFIXES, ".json", ".tar")  # endings of files with rows
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_pairs(path: str | Path | Columns, spec: DataSpec = AS_FOUND) -> PairTable:
    """The usable pairs of a file, a folder or a Hub data set; `.problems` names every other row.

    path: parquet, jsonl, csv, tsv, json or tar file; a folder of parquet or tar shards, of chosen/ and
        rejected/ images, or written by `save_to_disk`; a Hub id; the URL of remote parquet shards; or rows that are
        open already (`object_columns`).

    Raises DataError when the file or folder cannot be read as pairs at all.
    """
    stored = open_columns(path, spec.split) if isinstance(path, str | Path) else ranked(path) or path
    stored = _ranked(stored, spec, str(path))
    remote = isinstance(stored, RemoteParquet)
    columns = {part: name for part, name in spec.columns.items() if part not in PARTS}
    stored, layout = find_layout(stored, spec.format, columns)
    if spec.lists and isinstance(stored, RankedColumns):
        return open_lists(stored, layout, spec)
    if remote:
        _streamable(str(path), stored, layout, spec)
    flags = [spec.keep_ties, spec.invert_preference, spec.verify, spec.max_pairs]
    names = [spec.format, spec.split, sorted(spec.columns.items()), repr(layout)]
    note = remembered_at(stored, {"flags": flags, "names": names})
    index = None if note is None else recall(note)
    if index is not None:
        log.info("%s: rows examined earlier, result read from %s", stored.storage, note)
    else:
        index = examine(stored, layout, spec)
        if note is not None or len(index.ids) >= FROM_ROWS:
            index.pack()
        if note is not None and not index.names_files:
            remember(note, index)
    return PairTable(stored, layout, index, invert_preference=spec.invert_preference)


def _ranked(stored: Columns, spec: DataSpec, path: str) -> Columns:
    """The rows, or the pairs of rows that are rankings. Raises DataError for settings of rankings without any."""
    if isinstance(stored, RankedColumns) and has_pairs(spec.columns):
        stored = stored.lists  # columns names the images of pairs
    if isinstance(stored, RemoteParquet) and set(PARTS) & spec.columns.keys():
        raise DataError(
            f"columns={spec.columns}: ranked images of {path} are not streamed; copy the data here and name the folder"
        )
    found = ranked(stored, spec.columns) if set(PARTS) & spec.columns.keys() else stored
    if found is None or not isinstance(found, RankedColumns):
        if spec.pairs_of_ranking != "all" or found is None:
            setting = f"pairs_of_ranking={spec.pairs_of_ranking!r}" if found is not None else f"columns={spec.columns}"
            raise DataError(
                f"{setting}: {path} has pairs and no rankings, which are HPDv2's json, or rows with a list of images "
                f"and {NEEDED}; remove it"
            )
        return stored
    if len(found.orders) > 1:
        log.warning("%s: the order is read from %s, not from %s", found.storage, found.orders[0], found.orders[1:])
    if spec.lists and spec.pairs_of_ranking != "all":
        raise DataError(
            f"pairs_of_ranking={spec.pairs_of_ranking!r}: the objective compares whole lists, and no pairs are chosen; "
            "remove it, or use an objective of pairs, e.g. dpo"
        )
    return found.only(spec.pairs_of_ranking)


def _streamable(path: str, stored: Columns, layout: Layout, spec: DataSpec) -> None:
    """Raises DataError for remote rows that cannot be used without fetching all of them first."""
    if not isinstance(stored, RemoteParquet):
        raise DataError(f"{path}: rows with two prompts are not streamed; copy the data here and name the folder")
    if spec.verify != "none":
        raise DataError(
            f"{path}: verify={spec.verify!r} reads every image, so all shards would be fetched first; set it to none "
            "(data.verify in a config)"
        )
    if not layout.uids or "mask" in layout.terms:
        what = "a mask column" if layout.uids else "no uid columns, so ids would be hashes of all images"
        raise DataError(f"{path} has {what}, and is not streamed; copy the data here and name the folder")


def open_columns(path: str | Path, split: str = "train") -> Columns:
    """The stored rows behind a path, URL or Hub id, whatever their columns. Raises DataError."""
    if is_remote(str(path)):
        return open_remote(str(path), split)
    place = Path(expanded(str(path)))
    if place.parts[:1] and place.parts[0].startswith("~"):  # ./~ is this very name, which pyarrow would expand
        place = place.absolute()
    if place.is_file():
        has_no_splits(place, split)
        stored = _open_file(place)
    else:
        stored = _open_folder(place, split) if place.is_dir() else _open_hub(str(path), place, split)
    return stored if isinstance(stored, RankedColumns) else ranked(stored) or stored


def _open_hub(name: str, place: Path, split: str) -> Columns:
    """A Hub data set. Raises DataError for a name that can only be a path."""
    if name.startswith((".", "/", "~")) or place.suffix or not _HUB_ID.fullmatch(name):
        near = difflib.get_close_matches(place.name, _listed(place.parent), n=1)
        hint = f"; did you mean {place.parent / near[0]}?" if near else ""
        raise DataError(f"there is no file or folder {name}{hint}")
    from diffalign.data.formats.arrow import open_hub

    return open_hub(name, split)


def find_layout(stored: Columns, format: str, columns: Mapping[str, str]) -> tuple[Columns, Layout]:
    """The layout whose columns are all there, and the rows as it sees them (rows with two prompts are two).

    Raises DataError with the nearest names when none is.
    """
    if format not in FORMATS:
        raise DataError(f"format={format!r}; allowed are {', '.join(FORMATS)}")
    wanted = [format] if format != "auto" else list(_PARTS)
    known = {part for name in wanted for part in _parts(name)}
    for part, column in columns.items():
        if part not in known:
            raise DataError(f"columns names the part {part!r}; the parts are {', '.join(sorted(known))}")
        if not column and any(part in _optional(name) for name in wanted):
            continue
        if column not in stored.names:
            raise DataError(f"columns maps {part} to {column!r}, which {_has(stored)}{_near(column, stored)}")
    missing: dict[str, list[str]] = {}
    fitting: dict[str, dict[str, str]] = {}
    for name in wanted:
        parts = _parts(name)
        found = {part: column for part, column in columns.items() if part in parts}
        for part, names in parts.items():
            present = next((each for each in names if each in stored.names), None)
            if part not in found and present is not None:
                found[part] = present
        found = {part: column for part, column in found.items() if column}
        missing[name] = [part for part in parts if part not in found and part not in _optional(name)]
        if not missing[name]:
            fitting[name] = found
    meant = {name: found for name, found in fitting.items() if columns.keys() <= _parts(name).keys()}
    if len(meant) > 1:
        raise _several(stored, meant)
    for name, found in (meant or fitting).items():
        _say_choices(stored, found, _parts(name), columns)
        terms = {part: found[part] for part in TERMS if part in found}
        if name == two_prompts.FORMAT:
            rows = two_prompts.TwoPrompts(stored, found)
            return rows, replace(rows.layout, terms={part: part for part in terms})
        return stored, replace(_LAYOUTS[name].layout(found), terms=terms)
    raise _none_fits(stored, missing)


def _parts(name: str) -> dict[str, tuple[str, ...]]:
    """Part -> accepted column names of a format, best first, with the terms, which every format may have."""
    return _PARTS[name].PARTS | {part: (part,) for part in TERMS}


def _optional(name: str) -> frozenset[str]:
    """The parts that may be missing in a format."""
    return _PARTS[name].OPTIONAL | TERMS.keys()


def _none_fits(stored: Columns, missing: Mapping[str, Sequence[str]]) -> DataError:
    """The error for rows that lack columns of every format."""
    lines = [f"{stored.storage} {_has(stored)}; no known format matches:"]
    for name in sorted(missing, key=lambda each: len(missing[each])):
        for part in missing[name]:
            names = _parts(name)[part]
            lines.append(f"  {name} needs {part} (one of {', '.join(names)}){_near(names[0], stored)}")
    if any("image" in name for name in stored.names):
        lines.append(f"  a ranking needs prompt, images (a list), and {NEEDED}")
    lines.append("rename the columns, or name them: columns={'prompt': 'my_column', ...}")
    return DataError("\n".join(lines))


class SeveralFormatsError(DataError):
    """Rows have the columns of several formats, and none was asked for."""


def _several(stored: Columns, meant: Mapping[str, Mapping[str, str]]) -> SeveralFormatsError:
    """The error for rows that have the columns of several formats."""
    lines = [f"{stored.storage} has the columns of several formats:"]
    for name, found in meant.items():
        needed = [column for part, column in found.items() if part not in _optional(name)]
        lines.append(f"  {name}: {', '.join(needed)}")
    lines.append(f"set the format: data.format: {next(iter(meant))} in a config, --format on the command line")
    return SeveralFormatsError("\n".join(lines))


def _say_choices(
    stored: Columns, found: Mapping[str, str], parts: Mapping[str, Sequence[str]], named: Mapping[str, str]
) -> None:
    """Warn where a part could have been another column."""
    for part, column in found.items():
        others = [name for name in parts[part] if name in stored.names and name not in found.values()]
        if others and part not in named:
            log.warning(
                "%s: %s is read from the column %s, not from %s; to read that one, set data.columns: {%s: %s}",
                *(stored.storage, part, column, " or ".join(others), part, others[0]),
            )


def _has(stored: Columns) -> str:
    return f"has the columns {', '.join(stored.names) or '(none)'}"


def _near(name: str, stored: Columns) -> str:
    near = difflib.get_close_matches(name, stored.names, n=1)
    return f"; nearest name: {near[0]!r}" if near else ""


def _open_file(file: Path) -> Columns:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return open_parquet([file])
    if suffix in SUFFIXES:
        return open_listing(file)
    if suffix == ".json":
        return open_json(file)
    if suffix == ".tar":
        return open_shards([file])
    known = ", ".join(_STORED)
    raise DataError(f"{file} ends in {file.suffix or 'nothing'}; pairs are read from {known} files and folders")


def _open_folder(folder: Path, split: str) -> Columns:
    if is_pair_folder(folder):
        has_no_splits(folder, split)
        return open_folder(folder)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        from diffalign.data.formats.arrow import open_saved

        return open_saved(folder, split)
    below = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _STORED and file.is_file())
    below = [file for file in below if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    kinds = {kind: [file for file in below if file.suffix.lower() == kind] for kind in (".parquet", ".tar")}
    kinds[""] = [file for file in below if file.parent == folder and file.suffix.lower() not in kinds]
    there = [kind for kind, files in kinds.items() if files]
    if len(there) > 1:
        others = [file.name for kind in there[1:] for file in kinds[kind]]
        log.warning("%s: only its %s files are read; left out: %s", folder, there[0], others[:8])
    if there:
        files = kinds[there[0]]
        if there[0] == "":
            return _open_file(_of_one_split(files, folder, split))
        return (open_parquet if there[0] == ".parquet" else open_shards)(of_split(files, folder, split))
    raise DataError(
        f"{folder} contains {_listed(folder)[:8] or 'nothing'}; a folder of pairs has chosen/ and "
        "rejected/, parquet or tar shards, one listing (jsonl, csv, json), or is a dataset saved by "
        "save_to_disk"
    )


def _of_one_split(files: Sequence[Path], folder: Path, split: str) -> Path:
    found = of_split(files, folder, split)
    if len(found) > 1:
        raise DataError(f"{folder} contains several listings, {[file.name for file in found]}; name one of them")
    return found[0]


def _listed(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
