"""Pairs: layouts that other tools read, labels that follow the true reward, the same bytes every time."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.world import pairs_path
from diffalign.world.captions import parse, splits
from diffalign.world.pairs import PairRecipe, make_pairs, write_pairs
from diffalign.world.scorer import WorldReward, WorldSize

PICK_A_PIC = {
    "caption": "string",
    "jpg_0": "binary",
    "jpg_1": "binary",
    "label_0": "double",
    "label_1": "double",
    "has_label": "bool",
    "are_different": "bool",
    "image_0_uid": "string",
    "image_1_uid": "string",
    "score_0": "float",
    "score_1": "float",
}


def test_committed_pairs_are_what_their_command_writes() -> None:
    """Pixels, not file bytes: PNG and parquet writers differ between versions."""
    rows = pq.read_table(pairs_path()).to_pylist()
    assert len(rows) == 1024
    for row, pair in zip(rows[:200], make_pairs(PairRecipe(n=200, seed=0))):
        assert row["caption"] == pair.caption
        assert (row["label_0"] == 1.0) == pair.first_is_better
        for side in (0, 1):
            image = Image.open(io.BytesIO(row[f"jpg_{side}"]))
            assert np.array_equal(np.asarray(image), pair.pictures[side])


def test_committed_labels_follow_the_reward_and_name_training_combinations_only() -> None:
    rows = pq.read_table(pairs_path()).to_pylist()
    train = set(splits()["train"])
    assert all(parse(row["caption"]) in train for row in rows)
    assert all((row["score_0"] > row["score_1"]) == (row["label_0"] == 1.0) for row in rows)
    assert all(row["label_0"] + row["label_1"] == 1.0 for row in rows)
    assert 0.45 < np.mean([row["label_0"] for row in rows]) < 0.55
    images = [Image.open(io.BytesIO(row["jpg_1"])) for row in rows]
    scores = WorldReward().score(images, [row["caption"] for row in rows])
    np.testing.assert_allclose(scores, [row["score_1"] for row in rows], atol=1e-4)
    assert pairs_path().stat().st_size < 2_000_000


def test_parquet_layout(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "sub" / "a.parquet", PairRecipe(n=10, seed=3))
    table = pq.read_table(path)
    assert {f.name: str(f.type) for f in table.schema} == PICK_A_PIC
    uids = table["image_0_uid"].to_pylist() + table["image_1_uid"].to_pylist()
    assert len(set(uids)) == 20
    again = write_pairs(tmp_path / "b.parquet", PairRecipe(n=10, seed=3))
    assert path.read_bytes() == again.read_bytes()
    assert path.read_bytes() != write_pairs(tmp_path / "c.parquet", PairRecipe(n=10, seed=4)).read_bytes()


def test_folder_layout(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs", PairRecipe(n=5, seed=3), layout="folder")
    names = sorted(p.stem for p in folder.glob("*.txt"))
    assert len(names) == 5
    captions = [(folder / f"{n}.txt").read_text().strip() for n in names]
    chosen, rejected = (
        WorldReward().score([Image.open(folder / side / f"{n}.png") for n in names], captions)
        for side in ("chosen", "rejected")
    )
    assert (chosen > rejected).all()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_pairs(folder, PairRecipe(n=5, seed=3), layout="folder")


def test_fewer_pairs_are_the_beginning_of_more() -> None:
    few, many = make_pairs(PairRecipe(n=3, seed=0)), make_pairs(PairRecipe(n=300, seed=0))
    assert [p.name for p in few] == [p.name for p in many[:3]]
    assert all(np.array_equal(a.pictures, b.pictures) for a, b in zip(few, many))


def test_shuffled_labels_say_nothing_and_change_nothing_else() -> None:
    true, shuffled = make_pairs(PairRecipe(n=600, seed=0)), make_pairs(PairRecipe(n=600, seed=0, shuffle_labels=True))
    agree = np.mean([a.first_is_better == b.first_is_better for a, b in zip(true, shuffled)])
    assert 0.42 < agree < 0.58
    assert sum(p.first_is_better for p in true) == sum(p.first_is_better for p in shuffled)
    assert all(a.scores == b.scores and a.caption == b.caption for a, b in zip(true, shuffled))


def test_another_taste_judges_the_same_images() -> None:
    mine, other = make_pairs(PairRecipe(n=60, seed=0)), make_pairs(PairRecipe(n=60, seed=0, reward="world-size"))
    disagree = 0
    for a, b in zip(mine, other):
        assert a.caption == b.caption
        assert {picture.tobytes() for picture in a.pictures} == {picture.tobytes() for picture in b.pictures}
        shown = [Image.fromarray(picture) for picture in b.pictures]
        np.testing.assert_allclose(b.scores, WorldSize().score(shown, [b.caption] * 2), atol=1e-4)
        assert b.first_is_better == (b.scores[0] > b.scores[1])
        chosen = [pair.pictures[0 if pair.first_is_better else 1].tobytes() for pair in (a, b)]
        disagree += chosen[0] != chosen[1]
    assert 10 < disagree < 50


def test_faulty_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n is 0"):
        make_pairs(PairRecipe(n=0, seed=0))
    with pytest.raises(ValueError, match=r"source is 'photos'.*'renders' or 'samples'"):
        make_pairs(PairRecipe(n=1, seed=0, source="photos"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layout is 'json'"):
        write_pairs(tmp_path / "x", PairRecipe(n=1, seed=0), layout="json")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reward is 'beauty'; it must be 'world' or 'world-size'"):
        make_pairs(PairRecipe(n=1, seed=0, reward="beauty"))  # type: ignore[arg-type]
