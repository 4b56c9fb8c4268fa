"""The identity of a run's rows, in a few hashes that cost little: compared when a run is resumed.

`PairTable.identity` reads every image file once; this uses what examining the rows has found already (ids, prompts,
labels, scores, sizes of the image files) and reads the files of a few pairs, spread over the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from diffalign.data.row import ImageError, ImageRef
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.prompts import Table
from diffalign.data.table.texts import hash_parts, hash_texts

SAMPLES = 32  # pairs whose image files are read

WORDS = {
    "pairs": "number of rows",
    "ids": "rows or their order",
    "prompts": "prompts",
    "sides": "which image is preferred",
    "scores": "scores",
    "terms": "weights or margins",
    "users": "users",
    "sizes": "sizes of the image files",
    "samples": "contents of the image files",
    "contents": "contents of the image files",
}


def data_identity(table: Table, contents: bool = False) -> dict[str, str]:
    """Hashes of a table's parts by name, a key of WORDS; `contents`: with the contents of all image files."""
    known = table.index.hashes if isinstance(table, PairTable) else {}
    facts = {
        "pairs": str(len(table)),
        "ids": known.get("ids") or hash_texts(table.ids),
        "prompts": known.get("prompts") or hash_texts(table.prompts),
    }
    if isinstance(table, PairTable):
        facts |= {name: hash_parts(parts) for name, parts in table.parts().items()}
    if samples := list(_samples(table)):
        facts["samples"] = hash_parts(samples)
    if contents:
        facts["contents"] = table.identity
    return facts


def _samples(table: Table) -> Iterator[bytes]:
    """The image files of a few rows, where rows name files, or the images of a few winners."""
    if isinstance(table, PairTable):
        files = table.index.by_file
        for place in _spread(len(files)):
            yield from _read(partial(table.stored, files[place]))
    elif hasattr(table, "chosen"):  # a protocol, `Winners`
        for index in _spread(len(table)):
            yield from _read(partial(_winner, table, index))


def _winner(table: Any, index: int) -> tuple[ImageRef]:
    return (table.chosen(index),)


def _spread(count: int) -> list[int]:
    """At most SAMPLES places among `count`, evenly spread."""
    return sorted({place * count // SAMPLES for place in range(SAMPLES)}) if count else []


def _read(refs: Callable[[], Iterable[ImageRef]]) -> list[bytes]:
    """Some images as they are stored; none where one cannot be read, which is reported where they are needed."""
    try:
        return [ref.read() for ref in refs()]
    except ImageError:
        return []
