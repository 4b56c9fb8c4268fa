"""Users of the world: opposite tastes, labels by them, and a committed file that its command writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.data.table.open import open_pairs
from diffalign.data.table.users import open_users, use_users
from diffalign.world import pairs_path
from diffalign.world.pairs import PairRecipe, make_pairs, write_pairs
from diffalign.world.scorer import WorldBold, WorldQuiet
from diffalign.world.users import world_user, world_users

TASTES = pairs_path().with_name("tastes.parquet")


def test_users_are_evenly_between_the_ends_and_mixtures_of_them() -> None:
    bold, middle, quiet = world_users(3)
    assert [bold.taste, middle.taste, quiet.taste] == [1, 0, -1]
    assert (bold.name, quiet.name) == ("bold", "quiet")
    mean = (np.array(bold.embedding) + np.array(quiet.embedding)) / 2
    np.testing.assert_allclose(middle.embedding, mean, atol=2e-6)
    assert np.linalg.norm(bold.embedding) == pytest.approx(1, abs=1e-5)
    assert world_user(0.5).embedding != bold.embedding
    with pytest.raises(ValueError, match="at least two"):
        world_users(1)


def test_labels_follow_the_taste_of_their_user_and_the_images_stay() -> None:
    pairs, plain = make_pairs(PairRecipe(n=150, seed=3, users=2)), make_pairs(PairRecipe(n=150, seed=3))
    assert {pair.user for pair in pairs} == {"bold", "quiet"}
    for pair, same in zip(pairs, plain, strict=True):
        images, texts = [Image.fromarray(x) for x in pair.pictures], [pair.caption] * 2
        scorer = WorldBold() if pair.user == "bold" else WorldQuiet()
        assert scorer.score(images, texts).tolist() == pytest.approx(pair.scores, abs=1e-4)
        assert pair.first_is_better == (pair.scores[0] > pair.scores[1])
        assert pair.caption == same.caption
        assert {x.tobytes() for x in pair.pictures} == {x.tobytes() for x in same.pictures}


def test_the_committed_pairs_are_what_their_command_writes() -> None:
    rows = pq.read_table(TASTES).to_pylist()
    assert len(rows) == 1024
    for row, pair in zip(rows[:128], make_pairs(PairRecipe(n=128, seed=0, users=2))):
        assert (row["caption"], row["user"], row["label_0"] == 1.0) == (pair.caption, pair.user, pair.first_is_better)
    expected = {user.name: list(user.embedding) for user in world_users(2)}
    assert json.loads(TASTES.with_suffix(".users.json").read_text()) == expected


def test_written_users_are_read_back(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.parquet", PairRecipe(n=20, seed=1, users=4))
    table, users = open_pairs(tmp_path / "pairs.parquet"), open_users(tmp_path / "pairs.users.json")
    use_users(table, users, where="users")
    assert set(users.embeddings) == {"bold", "taste+0.33", "taste-0.33", "quiet"}
    assert table.user_dim == 8
    with pytest.raises(ValueError, match="no place for users"):
        write_pairs(tmp_path / "folder", PairRecipe(n=4, seed=1, users=2), layout="folder")
