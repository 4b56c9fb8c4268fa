"""Labelled pairs as a new data set, in three layouts that `data.path` reads.

    pairs.parquet    Pick-a-Pic's columns, images inside
    pairs.jsonl      the same columns; the images are files in pairs_images/ beside it
    pairs            a folder: chosen/, rejected/ and captions; it has no place for ties, scores and users

Images are those of the source, byte for byte. Every layout appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from diffalign.data.formats.pickapic import write_pickapic
from diffalign.data.row import ImageRef
from diffalign.data.table.pairs import PairTable
from diffalign.data.weights import TERMS
from diffalign.errors import DiffalignError, ExistingFileError
from diffalign.io.files import written_whole

Label = Literal["first", "second", "tie"]
_FIRST = {"first": 1.0, "second": 0.0, "tie": 0.5}  # label_0
_ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}


@dataclass(frozen=True)
class LabelledPair:
    """A pair as it is written: two images, the label that says which is preferred, and what else its row has."""

    prompt: str
    images: tuple[ImageRef, ImageRef]
    label: Label
    uids: tuple[str, str] | None = None  # of the images; None: hashes of their bytes
    more: Mapping[str, Any] = field(default_factory=dict)  # score_0, score_1, weight, margin, mask, user, user_embed


def check_pairs_out(out: Path, *, replace: bool = False) -> None:
    """Raises DiffalignError unless the name is that of one of the layouts.

    Raises ExistingFileError for a folder of pairs or images that is not empty, unless it is to be replaced.
    """
    if out.suffix not in (".parquet", ".jsonl", ""):
        raise DiffalignError(
            f"{out}: pairs are written to a .parquet file, to a .jsonl file with a folder of images beside it, or to a "
            "folder, whose name has no ending"
        )
    folder = images_of(out) if out.suffix == ".jsonl" else out
    if not replace and out.suffix != ".parquet" and folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ExistingFileError(
            f"{folder} is not an empty folder; pairs are not mixed with what is there. Name a new one"
        )


def check_columns(out: Path, columns: Sequence[str]) -> None:
    """Raises DiffalignError for columns that a folder of pairs has no place for."""
    lost = [] if out.suffix else [name for name in columns if name not in TERMS]
    if lost:
        raise DiffalignError(
            f"{out}: a folder of pairs has no place for {', '.join(lost)}; name a .parquet or .jsonl file"
        )


def images_of(listing: Path) -> Path:
    """The folder of a jsonl's images."""
    return listing.with_name(f"{listing.stem}_images")


def write_pairs(out: Path, pairs: Iterable[LabelledPair], columns: Sequence[str] = ()) -> None:
    """Writes the pairs to `out`, whose name says which layout; `columns` are those that `more` of each pair has.

    A folder leaves ties out. Raises DiffalignError for columns that a folder has no place for, and ImageError for an
    image that cannot be read.
    """
    if out.suffix == ".parquet":
        write_pickapic(out, ({**_row(pair), **_data(pair)} for pair in pairs), columns=columns)
    elif out.suffix == ".jsonl":
        _write_listing(out, pairs)
    else:
        check_columns(out, columns)
        _write_folder(out, (pair for pair in pairs if pair.label != "tie"))


def _row(pair: LabelledPair) -> dict[str, Any]:
    """The columns of a pair besides its images and their uids."""
    first = _FIRST[pair.label]
    labels = {"label_0": first, "label_1": 1.0 - first, "has_label": True, "are_different": True}
    more = {name: None if value != value else value for name, value in pair.more.items()}  # JSON has no NaN
    return {"caption": pair.prompt, **labels, **more}


def _data(pair: LabelledPair) -> dict[str, Any]:
    data = [ref.read() for ref in pair.images]
    return {"jpg_0": data[0], "jpg_1": data[1], **_uids(pair, data)}


def _uids(pair: LabelledPair, data: Sequence[bytes]) -> dict[str, str]:
    uids = pair.uids or [hashlib.blake2b(each, digest_size=16).hexdigest() for each in data]
    return {f"image_{side}_uid": uid for side, uid in enumerate(uids)}


def _write_listing(out: Path, pairs: Iterable[LabelledPair]) -> None:
    folder = images_of(out)
    with written_whole(out, what="the pairs") as listing, written_whole(folder, what="the images of pairs") as images:
        images.mkdir()
        with listing.open("w", encoding="utf-8") as lines:
            for number, pair in enumerate(pairs):
                data = [ref.read() for ref in pair.images]
                names = [f"{number:06d}_{side}{_ending(data[side], pair.images[side])}" for side in range(2)]
                for name, each in zip(names, data, strict=True):
                    (images / name).write_bytes(each)
                paths = {f"image_{side}": f"{folder.name}/{name}" for side, name in enumerate(names)}
                lines.write(json.dumps({**_row(pair), **paths, **_uids(pair, data)}, ensure_ascii=False) + "\n")


def _write_folder(out: Path, pairs: Iterable[LabelledPair]) -> None:
    with written_whole(out, what="the pairs") as partial:
        for side in ("chosen", "rejected"):
            (partial / side).mkdir(parents=True)
        with (partial / "captions.jsonl").open("w", encoding="utf-8") as captions:
            for number, pair in enumerate(pairs):
                name = f"{number:06d}"
                captions.write(
                    json.dumps({"name": name, "prompt": pair.prompt, **pair.more}, ensure_ascii=False) + "\n"
                )
                images = pair.images if pair.label == "first" else pair.images[::-1]
                for side, ref in zip(("chosen", "rejected"), images):
                    data = ref.read()
                    (partial / side / f"{name}{_ending(data, ref)}").write_bytes(data)


def _format_ending(data: bytes) -> str:
    """The ending of a format that PIL recognises; empty for others."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            endings = [ending for ending, name in Image.registered_extensions().items() if name == image.format]
    except Exception:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return ""
    return endings[0] if endings else ""


def check_images_stay(out: Path, table: PairTable, pairs: str) -> None:
    """Raises DiffalignError where the images of a new listing would replace those that its pairs come from."""
    if out.suffix != ".jsonl" or not (folder := images_of(out).resolve()).exists():
        return
    for index in range(len(table)):
        for ref in table.stored(index):
            if ref.path is not None and folder in Path(ref.path).resolve().parents:
                raise DiffalignError(
                    f"--out {out} would replace the folder {images_of(out)}, which has images of {pairs} (first: "
                    f"{ref.where}); name another file"
                )


def _ending(data: bytes, ref: ImageRef) -> str:
    """The file ending of encoded bytes, as they begin; that of the source's file for formats that begin otherwise."""
    known = next((ending for start, ending in _ENDINGS.items() if data.startswith(start)), None)
    ending = known or ("" if ref.span is not None else Path(ref.path or "").suffix) or _format_ending(data)
    if not ending:
        raise DiffalignError(f"{ref.where}: the image's format is not known; write the pairs to a .parquet file")
    return ending
