"""Pairs that are there twice, contradict each other, or share an image with other pairs: found by the images' bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from diffalign.data.table.pairs import PairTable
from diffalign.io.progress import Progress


@dataclass(frozen=True)
class Duplicates:
    """Indices of pairs of a table."""

    repeated: list[int] = field(default_factory=list)  # an earlier pair has the same prompt, images and label
    contradictory: list[int] = field(default_factory=list)  # others have the same prompt and images, the label swapped
    shared: list[int] = field(default_factory=list)  # an image is in the other pairs as well


def find_duplicates(table: PairTable, other: PairTable | None = None) -> Duplicates:
    """The duplicates of a table, by the bytes of the images and the prompt as it is written.

    Raises ImageError for an image that cannot be read.
    """
    elsewhere = {image for pair in _images(other, "images of the other pairs") for image in pair} if other else set()
    found = Duplicates()
    first: dict[tuple[str, frozenset[bytes]], tuple[int, bytes]] = {}  # the pair that came first, and its chosen image
    contradicted: set[tuple[str, frozenset[bytes]]] = set()
    keys = []
    for index, (chosen, rejected) in enumerate(_images(table, "images of the pairs")):
        key = table.prompts[index], frozenset((chosen, rejected))
        keys.append(key)
        if first.setdefault(key, (index, chosen))[1] != chosen:
            contradicted.add(key)
        elif first[key][0] != index:
            found.repeated.append(index)
        if elsewhere & key[1]:
            found.shared.append(index)
    found.contradictory.extend(index for index, key in enumerate(keys) if key in contradicted)
    return found


def _images(table: PairTable, what: str) -> Iterator[tuple[bytes, bytes]]:
    """Hashes of the chosen and the rejected image of each pair."""
    for index in Progress(range(len(table)), desc=what, unit=" pairs", delay=3.0):
        row = table[index]
        yield _hash(row.chosen.read()), _hash(row.rejected.read())


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
