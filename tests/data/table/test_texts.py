"""Packed texts are the list that they were made of; a packed table has the identity of an unpacked one."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from diffalign.data.table import open as opening
from diffalign.data.table import texts as module
from diffalign.data.table.identity import data_identity
from diffalign.data.table.open import open_pairs
from diffalign.data.table.texts import Texts
from tests.data.helpers import pick_rows, write_parquet

MANY = ["a", "", "zwölf", "狐", "a", "\ud800 half", "", "tail"] * 3 + ["last"]


@pytest.mark.parametrize(
    "texts", [MANY, list(dict.fromkeys(MANY)), [""], []], ids=["equal ones", "each once", "", "no"]
)
def test_they_are_the_list_that_they_were_made_of(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    packed = pickle.loads(pickle.dumps(Texts.of(texts)))
    assert list(packed) == texts
    assert packed == texts
    assert [packed[i] for i in range(len(texts))] == texts
    assert [packed[i - len(texts)] for i in range(len(texts))] == texts
    assert packed[1::2] == texts[1::2]
    places = [0, 2, 2, 1][: len(texts)]
    assert packed.select(places).select(range(len(places))) == [texts[i] for i in places]
    assert ("a" in packed) is ("a" in texts)
    assert packed != [*texts, "more"]
    with pytest.raises(IndexError):
        packed[len(texts)]


def test_a_packed_table_is_the_unpacked_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "pairs.parquet", pick_rows(9))
    plain = open_pairs(file)
    monkeypatch.setattr(opening, "FROM_ROWS", 1)
    packed = open_pairs(file)
    assert isinstance(plain.ids, list)
    assert isinstance(packed.ids, Texts)
    assert (packed.ids, packed.prompts) == (plain.ids, plain.prompts)
    assert packed.identity == plain.identity
    assert data_identity(packed) == data_identity(plain)
    assert packed.index.hashes
    some = [7, 2, 3]
    assert data_identity(packed.part(some)) == data_identity(plain.part(some)) != data_identity(plain)
