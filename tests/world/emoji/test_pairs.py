"""Pairs: labels follow the true reward and the taste, controls do not; the committed file is its command's."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError, ExistingFileError
from diffalign.rewards import load_scorer
from diffalign.world.emoji import asset, pairs, pairs_path
from diffalign.world.emoji.captions import STYLES, combinations, parse
from diffalign.world.emoji.controls import write_control
from diffalign.world.emoji.pairs import BEST_OF, PairRecipe, make_pairs, users, write_pairs
from diffalign.world.pairs import Pair
from diffalign.world.sample import sample_pixels

LABELS = ["label_0", "label_1"]


def test_committed_labels_follow_reward_and_taste() -> None:
    rows = pq.read_table(pairs_path()).to_pylist()
    known = set(combinations("train"))
    assert all(parse(row["caption"])._replace(style=None) in known for row in rows)
    assert all((row["score_0"] > row["score_1"]) == (row["label_0"] == 1.0) for row in rows)
    assert 0.45 < np.mean([row["label_0"] for row in rows]) < 0.55
    some = rows[::8]
    images, texts = [Image.open(io.BytesIO(row["jpg_1"])) for row in some], [row["caption"] for row in some]
    scores = load_scorer("emoji-taste-glossy").score(images, texts)
    off = (scores - torch.tensor([row["score_1"] for row in some])).abs()  # the scores are of images before JPEG
    assert off.mean() < 0.05


def test_committed_renders_are_what_their_command_writes() -> None:
    rows = pq.read_table(asset("pairs/renders.parquet")).slice(0, 64).to_pylist()
    for row, pair in zip(rows, make_pairs(PairRecipe(64, 0, "renders"))):
        assert (row["caption"], row["label_0"] == 1.0) == (pair.caption, pair.first_is_better)
        for side in (0, 1):
            image = np.asarray(Image.open(io.BytesIO(row[f"jpg_{side}"])), dtype=float)
            assert np.abs(image - pair.pictures[side]).mean() < 4


def test_a_committed_pair_is_the_best_and_the_worst_of_four_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pair of the file's command. The other captions' samples, which take minutes, are left out."""

    def first_caption(pipe: StableDiffusionXLPipeline, prompts: list[str], seeds: list[int]) -> Tensor:
        made = sample_pixels(pipe, prompts[:BEST_OF], seeds[:BEST_OF])
        return made.repeat(len(prompts) // BEST_OF, 1, 1, 1)

    monkeypatch.setattr("diffalign.world.sample.sample_pixels", first_caption)
    pair = make_pairs(PairRecipe(n=1, seed=0))[0]
    row = pq.read_table(pairs_path()).slice(0, 1).to_pylist()[0]
    assert row["caption"] == pair.caption
    assert (row["label_0"] == 1.0) == pair.first_is_better
    for side in (0, 1):
        image = np.asarray(Image.open(io.BytesIO(row[f"jpg_{side}"])), dtype=float)
        assert np.abs(image - pair.pictures[side]).mean() < 4  # JPEG's error is 1.6
    np.testing.assert_allclose(pair.scores, (row["score_0"], row["score_1"]), atol=0.02)


def test_faults_stay_in_the_training_combinations() -> None:
    rng, wanted = np.random.default_rng(0), list(combinations("train") * 3)
    shown = pairs._with_faults(wanted, rng)
    assert {c._replace(style=None) for c in shown} <= set(combinations("train"))
    assert np.mean([a != b for a, b in zip(wanted, shown)]) == pytest.approx(0.15, abs=0.05)


def test_tastes_choose_other_images_of_the_same_captions() -> None:
    flat, glossy = (make_pairs(PairRecipe(128, 3, "renders", taste)) for taste in ("flat", "glossy"))
    assert [p.caption for p in flat] == [p.caption for p in glossy]

    def sides(p: Pair) -> tuple[bytes, bytes]:
        """Chosen, rejected."""
        first, second = (picture.tobytes() for picture in p.pictures)
        return (first, second) if p.first_is_better else (second, first)

    same = np.mean([sides(a)[0] == sides(b)[0] for a, b in zip(flat, glossy)])
    opposite = np.mean([sides(a)[0] == sides(b)[1] for a, b in zip(flat, glossy)])
    assert 0.2 < same < 0.6  # captions that name a style, and those where only one of four renders is right
    assert 0.1 < opposite < 0.5


def test_users_prefer_by_their_style(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "tastes.parquet", PairRecipe(40, 0, "renders", taste=None))
    rows = pq.read_table(path).to_pylist()
    assert {row["user"] for row in rows} == set(STYLES)
    written = json.loads((tmp_path / "tastes.users.json").read_text())
    assert written == users()
    assert len({tuple(v) for v in written.values()}) == 3


def test_controls_have_the_same_images_and_other_labels(tmp_path: Path) -> None:
    true = pq.read_table(pairs_path())
    shuffled = pq.read_table(write_control(tmp_path / "shuffled.parquet", pairs_path()))
    flipped = pq.read_table(write_control(tmp_path / "flipped.parquet", pairs_path(), "flipped"))
    assert true.drop_columns(LABELS) == shuffled.drop_columns(LABELS) == flipped.drop_columns(LABELS)
    first, dealt = np.array(true["label_0"]), np.array(shuffled["label_0"])
    assert np.array_equal(flipped["label_0"], 1 - first)
    assert np.array_equal(flipped["label_1"], first)
    assert 0.4 < np.mean(first == dealt) < 0.6
    assert sorted(first) == sorted(dealt)
    assert np.array_equal(shuffled["label_1"], 1 - dealt)


def test_controls_of_what_has_no_labels_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a cat"], "label_1": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(DiffalignError, match=r"a.parquet has no column 'label_0'"):
        write_control(tmp_path / "b.parquet", tmp_path / "a.parquet")
    with pytest.raises(ExistingFileError, match=r"a.parquet exists"):
        write_control(tmp_path / "a.parquet", pairs_path())
    with pytest.raises(DiffalignError, match="labels is 'wrong'"):
        write_control(tmp_path / "b.parquet", pairs_path(), "wrong")  # type: ignore[arg-type]


def test_the_first_pairs_do_not_depend_on_their_number() -> None:
    few, more = make_pairs(PairRecipe(4, 2, "renders")), make_pairs(PairRecipe(130, 2, "renders"))
    assert [p.caption for p in few] == [p.caption for p in more[:4]]
    assert all(np.array_equal(a.pictures[1], b.pictures[1]) for a, b in zip(few, more))


def test_what_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="taste is 'bold'; it must be one of 'none', 'classic'"):
        make_pairs(PairRecipe(n=1, seed=0, taste="bold"))
    with pytest.raises(DiffalignError, match="n is 0"):
        make_pairs(PairRecipe(n=0, seed=0))
    path = write_pairs(tmp_path / "a.parquet", PairRecipe(1, 0, "renders"))
    with pytest.raises(ExistingFileError, match="overwrite"):
        write_pairs(path, PairRecipe(1, 0, "renders"))
    with pytest.raises(DiffalignError, match="no place for users"):
        write_pairs(tmp_path / "folder", PairRecipe(n=1, seed=0, taste=None), layout="folder")
