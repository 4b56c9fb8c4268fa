"""The world's ranked lists: the committed ones are what their command writes, and the arena has as many images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.arena import folder
from diffalign.arena.entries import LIST_IMAGES, entries
from diffalign.arena.folder import ArenaFolder
from diffalign.data.spec import DataSpec
from diffalign.data.table.lists import ListTable, counted_lengths
from diffalign.data.table.open import open_pairs
from diffalign.errors import DiffalignError, ExistingFileError
from diffalign.world import _asset
from diffalign.world.lists import ListRecipe, list_rows, write_lists

LISTS = DataSpec(lists=True)


def pixels(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)))


def test_committed_lists_are_what_their_command_writes() -> None:
    file = _asset("pairs/lists.parquet")
    rows, made = pq.read_table(file).to_pylist(), list_rows(ListRecipe(16, 0))
    assert len(rows) == 512
    for stored, again in zip(rows, made):
        assert stored["prompt"] == again["prompt"]
        assert stored["scores"] == pytest.approx(again["scores"], abs=1e-5)
        for one, other in zip(stored["images"], again["images"], strict=True):
            assert np.array_equal(pixels(one), pixels(other))


def test_the_best_of_a_list_has_the_highest_reward_of_its_preference(tmp_path: Path) -> None:
    orders = []
    for reward in ("world", "world-size"):
        recipe = ListRecipe(8, 1, 3, reward)  # type: ignore[arg-type]
        table = open_pairs(write_lists(tmp_path / f"{reward}.parquet", recipe), LISTS)
        assert isinstance(table, ListTable)
        for row, order in zip(list_rows(recipe), table.index.orders, strict=True):
            assert order == tuple(np.argsort(row["scores"])[::-1])
        orders.append(table.index.orders)
    assert orders[0] != orders[1]


def test_the_arena_has_as_many_images_in_lists_as_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PAIRS", 16)
    arena = ArenaFolder(tmp_path, 1)
    entry, dpo = entries(("listwise_dpo", "dpo"))
    file = arena.data(entry, "world-size")
    lists = open_pairs(file, LISTS)
    assert counted_lengths(lists) == f"{2 * 16 // LIST_IMAGES} of {LIST_IMAGES} images"
    assert file == arena.data(entry, "world-size")
    assert arena.data(dpo, "world") == arena.pairs("world")


def test_faulty_arguments_are_named(tmp_path: Path) -> None:
    for arguments, message in (((0, 0), "n is 0"), ((4, 0, 9), "images is 9; a list has 2 to 8")):
        with pytest.raises(DiffalignError, match=message):
            ListRecipe(*arguments)
    (tmp_path / "there.parquet").write_text("")
    with pytest.raises(ExistingFileError, match=r"there\.parquet exists"):
        write_lists(tmp_path / "there.parquet", ListRecipe(2, 0))
