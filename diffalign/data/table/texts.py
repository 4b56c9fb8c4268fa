"""Many short texts as one block of bytes: the ids and prompts of a large table.

A million ids as Python strings take 80 MB, and as much again in each loader worker, because reading one changes its
reference count and so copies its page of memory. Here they are mapped from the file of the index (`index_cache.py`),
and a text is decoded when it is asked for.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

BLOCK = 4096  # texts that are decoded together when all are read
_ODD = "surrogatepass"  # half characters, which faulty rows may have


class Texts(Sequence[str]):
    """A sequence of strings that cannot be changed; equal to any sequence of the same strings."""

    def __init__(self, content: Tensor, ends: Tensor, places: Tensor | None = None) -> None:
        """content: UTF-8, uint8; ends: where each text ends in it, int64; places: of the entries, where they repeat or
        are some of the texts, int64."""
        self.content, self.ends, self.places = content, ends, places
        # one number of a tensor takes microseconds to read, one of a plain view of its memory tens of nanoseconds
        self._content, self._ends = content.numpy().data, ends.numpy().data
        self._places = None if places is None else places.numpy().data

    def __reduce__(self) -> tuple[Any, ...]:
        return Texts, (self.content, self.ends, self.places)

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """The same texts; equal ones are stored once."""
        known: dict[str, int] = {}
        places = torch.tensor([known.setdefault(text, len(known)) for text in texts], dtype=torch.int64)
        encoded = [text.encode(errors=_ODD) for text in known]
        ends = torch.tensor([len(raw) for raw in encoded], dtype=torch.int64).cumsum(0)
        content = torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8)
        return cls(content, ends, None if len(known) == len(places) else places)

    def select(self, places: Sequence[int]) -> Texts:
        """Some of the texts, in the order of `places`."""
        chosen = torch.tensor(list(places), dtype=torch.int64)
        return Texts(self.content, self.ends, chosen if self.places is None else self.places[chosen])

    def __len__(self) -> int:
        return len(self._ends if self._places is None else self._places)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Texts: ...

    def __getitem__(self, index: int | slice) -> str | Texts:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        place = range(len(self))[index]
        place = place if self._places is None else self._places[place]
        return str(self._content[self._ends[place - 1] if place else 0 : self._ends[place]], "utf-8", _ODD)

    def __iter__(self) -> Iterator[str]:
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), self.ends])
        for first in range(0, len(self), BLOCK):
            last = min(first + BLOCK, len(self))
            places = torch.arange(first, last) if self.places is None else self.places[first:last]
            for start, end in zip(ends[places].tolist(), ends[places + 1].tolist()):
                yield str(self._content[start:end], "utf-8", _ODD)

    def __contains__(self, value: object) -> bool:
        return any(text == value for text in self)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Texts of {len(self)}: {list(self[:3])}"


def hash_texts(texts: Iterable[str]) -> str:
    """Hash of some texts in their order."""
    return hash_parts(text.encode(errors=_ODD) for text in texts)


def hash_parts(parts: Iterable[bytes | bytearray | array[Any]]) -> str:
    """Hash of some bytes and numbers, of each part with its length."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.tobytes() if isinstance(part, array) else bytes(part)
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
