"""Pairs that are there twice, contradict each other, or share an image with other pairs: found by the images' bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from diffalign.data.row import TIE
from diffalign.data.table.pairs import PairTable
from diffalign.io.progress import Progress


@dataclass(frozen=True)
class Duplicates:
    """Indices of pairs of a table."""

    repeated: list[int] = field(default_factory=list)  # an earlier pair has the same prompt, images, user and label
    contradictory: list[int] = field(default_factory=list)  # of the same prompt, images and user, with several labels
    shared: list[int] = field(default_factory=list)  # an image is in the other pairs as well


def find_duplicates(table: PairTable, other: PairTable | None = None) -> Duplicates:
    """The duplicates of a table, by the bytes of the images, the prompt as it is written, and the user.

    Raises ImageError for an image that cannot be read.
    """
    others = image_hashes(other, "images of the other pairs") if other else ()
    elsewhere = {image for pair in others for image in pair}
    found = Duplicates()
    users = table.column(table.layout.user) if table.layout.user is not None else []
    labels: dict[Hashable, set[Hashable]] = {}  # of each prompt, two images and user; a label is the chosen image
    keys: list[Hashable] = []
    for index, (chosen, rejected) in enumerate(image_hashes(table, "images of the pairs")):
        images = frozenset((chosen, rejected))
        key = table.prompts[index], images, str(users[index]) if users else ""
        keys.append(key)
        label: Hashable = TIE if table.tie(index) else chosen
        if label in labels.setdefault(key, set()):
            found.repeated.append(index)
        labels[key].add(label)
        if elsewhere & images:
            found.shared.append(index)
    found.contradictory.extend(index for index, key in enumerate(keys) if len(labels[key]) > 1)
    return found


def image_hashes(table: PairTable, what: str) -> Iterator[tuple[bytes, bytes]]:
    """Hashes of the chosen and the rejected image of each pair."""
    for index in Progress(range(len(table)), desc=what, unit=" pairs", delay=3.0):
        row = table[index]
        yield _hash(row.chosen.read()), _hash(row.rejected.read())


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
