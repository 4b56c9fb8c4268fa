"""Pairs: labels follow the true reward and the taste, controls do not; the committed file is its command's."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.errors import DiffalignError, ExistingFileError
from diffalign.rewards import load_scorer
from diffalign.world.emoji import pairs_path
from diffalign.world.emoji.captions import STYLES, combinations, parse
from diffalign.world.emoji.pairs import PairRecipe, make_pairs, users, write_pairs


def test_committed_pairs_are_what_their_command_writes() -> None:
    """Pixels, not file bytes: PNG and parquet writers differ between versions."""
    rows = pq.read_table(pairs_path()).to_pylist()
    for row, pair in zip(rows[:64], make_pairs(PairRecipe(n=64, seed=0))):
        assert row["caption"] == pair.caption
        assert (row["label_0"] == 1.0) == pair.first_is_better
        for side in (0, 1):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(row[f"jpg_{side}"]))), pair.pictures[side])


def test_committed_labels_follow_reward_and_taste() -> None:
    rows = pq.read_table(pairs_path()).to_pylist()
    known = set(combinations("train"))
    assert all(parse(row["caption"])._replace(style=None) in known for row in rows)
    assert all((row["score_0"] > row["score_1"]) == (row["label_0"] == 1.0) for row in rows)
    assert 0.45 < np.mean([row["label_0"] for row in rows]) < 0.55
    some = rows[::8]
    images, texts = [Image.open(io.BytesIO(row["jpg_1"])) for row in some], [row["caption"] for row in some]
    scores = load_scorer("emoji").score(images, texts) + load_scorer("emoji-glossy").score(images, texts)
    np.testing.assert_allclose(scores, [row["score_1"] for row in some], atol=1e-3)


def test_tastes_disagree_about_the_same_images() -> None:
    by_taste = {taste: make_pairs(PairRecipe(n=128, seed=3, taste=taste)) for taste in ("none", *STYLES)}
    shown = {taste: sorted(p.pictures[k].tobytes() for p in pairs for k in (0, 1)) for taste, pairs in by_taste.items()}
    assert shown["none"] == shown["flat"] == shown["glossy"]

    def chosen(taste: str) -> list[bytes]:
        return [p.pictures[0 if p.first_is_better else 1].tobytes() for p in by_taste[taste]]

    agree = np.mean([a == b for a, b in zip(chosen("flat"), chosen("glossy"))])
    assert 0.4 < agree < 0.8


def test_users_prefer_by_their_style(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "tastes.parquet", PairRecipe(n=40, seed=0, taste=None))
    rows = pq.read_table(path).to_pylist()
    assert {row["user"] for row in rows} == set(STYLES)
    written = json.loads((tmp_path / "tastes.users.json").read_text())
    assert written == users()
    assert len({tuple(v) for v in written.values()}) == 3


def test_controls_have_the_same_images_and_other_labels() -> None:
    true, shuffled, flipped = (
        make_pairs(PairRecipe(n=128, seed=0, labels=kind)) for kind in ("true", "shuffled", "flipped")
    )
    for a, b, c in zip(true, shuffled, flipped):
        assert a.pictures[0].tobytes() == b.pictures[0].tobytes() == c.pictures[0].tobytes()
        assert a.first_is_better is not c.first_is_better
    same = np.mean([a.first_is_better == b.first_is_better for a, b in zip(true, shuffled)])
    assert 0.3 < same < 0.7
    assert sum(p.first_is_better for p in true) == sum(p.first_is_better for p in shuffled)


def test_the_first_pairs_do_not_depend_on_their_number() -> None:
    few, more = make_pairs(PairRecipe(n=4, seed=2)), make_pairs(PairRecipe(n=130, seed=2))
    assert [p.caption for p in few] == [p.caption for p in more[:4]]
    assert all(np.array_equal(a.pictures[1], b.pictures[1]) for a, b in zip(few, more))


def test_what_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="taste is 'bold'; it must be one of 'none', 'classic'"):
        make_pairs(PairRecipe(n=1, seed=0, taste="bold"))
    with pytest.raises(DiffalignError, match="n is 0"):
        make_pairs(PairRecipe(n=0, seed=0))
    path = write_pairs(tmp_path / "a.parquet", PairRecipe(n=1, seed=0))
    with pytest.raises(ExistingFileError, match="overwrite"):
        write_pairs(path, PairRecipe(n=1, seed=0))
    with pytest.raises(DiffalignError, match="no place for users"):
        write_pairs(tmp_path / "folder", PairRecipe(n=1, seed=0, taste=None), layout="folder")
