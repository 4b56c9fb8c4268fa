"""A folder of pairs: chosen/NAME.png and rejected/NAME.png, prompts in NAME.txt or in one captions file.

NAME may have folders in it (chosen/cats/1.png belongs to rejected/cats/1.png). Prompts come from
captions.json ({"NAME": "prompt"}), captions.jsonl or captions.csv (both with `name` and `prompt`, and where wanted
weight, margin and mask); without one of these from NAME.txt, NAME.caption or NAME.png.txt beside the folders, in
prompts/, chosen/ or rejected/.
Every file in the two folders is used or becomes a row with the reason why not; files whose name begins with a dot,
Thumbs.db and desktop.ini are passed over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.cells import Absent
from diffalign.data.formats.columns import ListColumns
from diffalign.data.formats.text_files import odd, open_listing, parse_json, read_text
from diffalign.data.row import DataError
from diffalign.data.weights import TERMS

IMAGES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"),
    *(".jp2", ".ppm", ".pgm", ".tga"),
)
TEXTS = (".txt", ".caption")
CAPTIONS = ("captions.json", "captions.jsonl", "captions.csv")
SIDES = ("chosen", "rejected")
_SYSTEM = ("thumbs.db", "desktop.ini")

Caption = dict[str, Any]  # of a name: its prompt, weight, margin and mask, or a fault


def is_pair_folder(folder: Path) -> bool:
    """Whether the folder has both sides as folders."""
    return all((folder / side).is_dir() for side in SIDES)


def open_folder(folder: Path) -> ListColumns:
    """One row per NAME found on either side, in name order; then one for each file that is not used.

    Raises DataError for two images of one name, for captions of another form, and for folders without an image.
    """
    files = {side: list(_below(folder / side)) for side in SIDES}
    sides = {side: _images(files[side], folder / side) for side in SIDES}
    names = sorted({name for images in sides.values() for name in images})
    if not names:
        raise DataError(f"{folder}/chosen and {folder}/rejected contain no images; known endings: {IMAGES}")
    listed, unused = _captions(folder)
    texts = None if listed is not None else _texts(folder)
    rows: list[Caption] = []
    wheres: list[str] = []
    faults: dict[int, str] = {}
    for name in names:
        cells = {side: _cell(name, side, sides) for side in SIDES}
        caption = listed.pop(name, None) if listed is not None else _caption_beside(name, sides, texts or {})
        if caption is None:
            caption = {"prompt": Absent(f"{_file(folder)} names no {name!r}; add it, or remove the images")}
        if fault := caption.get("fault") or odd(name):
            faults[len(rows)] = fault
        rows.append({"prompt": None, **{key: value for key, value in caption.items() if key != "fault"}, **cells})
        wheres.append(f"pair {name}")
    for name in listed or ():
        unused.append((f"{_file(folder)} name {name}", "there is no image of that name in chosen/ or rejected/"))
    unused += [(f"file {path}", why) for path, why in _others(files, texts or {}, names)]
    for where, why in unused:
        faults[len(rows)] = why
        rows.append({})
        wheres.append(where)
    return ListColumns(rows, wheres, storage=f"folder {folder.name}", base=folder, faults=faults)


def _below(folder: Path) -> Iterator[str]:
    """The files below a folder, as paths in it with /, in order; links to folders are followed once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and file.lower() not in _SYSTEM:
                yield os.path.relpath(os.path.join(place, file), folder).replace(os.sep, "/")


def _images(files: Sequence[str], folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in files:
        name, suffix = os.path.splitext(file)
        if suffix.lower() not in IMAGES:
            continue
        if name in found:
            raise DataError(
                f"{folder} has both {found[name]} and {file}; remove one, so that there is one image per name"
            )
        found[name] = file
    return found


def _cell(name: str, side: str, sides: Mapping[str, Mapping[str, str]]) -> str | Absent:
    if name in sides[side]:
        return f"{side}/{sides[side][name]}"
    (other,) = (each for each in SIDES if each != side)
    return Absent(
        f"there is no {side}/{name} with the ending of an image; add it, or remove {_cell(name, other, sides)}"
    )


def _file(folder: Path) -> str:
    """The captions file that is read."""
    return next(name for name in CAPTIONS if (folder / name).is_file())


def _captions(folder: Path) -> tuple[dict[str, Caption] | None, list[tuple[str, str]]]:
    """The caption of each name in the captions file, and its lines that name none; (None, …) without such a file."""
    there = [name for name in CAPTIONS if (folder / name).is_file()]
    unused: list[tuple[str, str]] = []
    if not there:
        return None, unused
    if len(there) > 1:
        raise DataError(f"{folder} has {' and '.join(there)}; remove all but the one with the right prompts")
    file = folder / there[0]
    pairs: list[tuple[Any, Caption]]
    if file.suffix == ".json":
        try:
            content = parse_json(read_text(file))
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{file} is not JSON ({error}); write one object that maps names to prompts") from error
        if not isinstance(content, dict):
            raise DataError(f"{file} must be one object that maps names to prompts")
        pairs = [(name, {"prompt": prompt}) for name, prompt in content.items()]
    else:
        listing = open_listing(file)
        if not {"name", "prompt"} <= set(listing.names):
            raise DataError(f"{file} has {sorted(listing.names)}; it needs the columns name and prompt")
        pairs = []
        for place, row in enumerate(listing.rows):
            caption = {part: row.get(part) for part in ("prompt", *TERMS) if part in listing.names}
            fault = listing.fault(place)
            name = row.get("name")
            if isinstance(name, int) and not isinstance(name, bool):
                name = str(name)
            pairs.append((name, caption | ({"fault": f"{listing.where(place)}: {fault}"} if fault else {})))
            if not isinstance(name, str):
                unused.append((listing.where(place), fault or ("its name is not a string; write the name of an image")))
    found: dict[str, Caption] = {}
    for given, caption in pairs:
        if not isinstance(given, str):
            continue
        stem, suffix = os.path.splitext(given)
        name = stem if suffix.lower() in IMAGES else given
        if name in found and found[name] != caption:
            caption = {"fault": f"{file.name} has {name!r} twice, with different values; remove one"}
        found[name] = caption
    return found, unused


def _texts(folder: Path) -> dict[str, list[str]]:
    """Caption files by the name in front of their ending, in the order in which they are tried."""
    found: dict[str, list[str]] = {}
    for place in (".", "prompts", *SIDES):
        for file in _below(folder / place):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in TEXTS and (place != "." or file.split("/")[0] not in ("prompts", *SIDES)):
                found.setdefault(stem, []).append(str(folder / place / file))
    return found


def _caption_beside(name: str, sides: Mapping[str, Mapping[str, str]], texts: Mapping[str, Sequence[str]]) -> Caption:
    keys = dict.fromkeys((name, *(images[name] for images in sides.values() if name in images)))
    files = [file for key in keys for file in texts.get(key, ())]
    if not files:
        where = "beside the folders, in prompts/, chosen/ or rejected/"
        return {"prompt": Absent(f"there is no {name}.txt {where}; write one, or remove the images")}
    try:
        prompts = {file: read_text(Path(file)).strip() for file in files}
    except DataError as error:
        return {"fault": str(error)}
    if len(set(prompts.values())) > 1:
        return {"fault": (f"{' and '.join(files)} have different prompts, and a pair has one; remove all but one")}
    return {"prompt": prompts[files[0]]}


def _others(
    files: Mapping[str, Sequence[str]], texts: Mapping[str, Sequence[str]], names: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Files of the two sides that are neither an image nor the caption of one, and why each is not used."""
    known = set(names)
    for side, paths in files.items():
        for file in paths:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in IMAGES:
                continue
            if suffix.lower() not in TEXTS:
                yield f"{side}/{file}", f"the ending {suffix or '(none)'} is not supported; known: {', '.join(IMAGES)}"
            elif not {stem, os.path.splitext(stem)[0]} & known:
                yield f"{side}/{file}", "a caption without an image of its name in chosen/ or rejected/"
