"""Scores in a file beside the pairs: computed once, resumed, and used in place of columns and labels."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL.Image import Image

from diffalign.cli.main import main
from diffalign.data.row import DataError
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.scores import read_scores, score_pairs, use_scores
from tests.data.helpers import pick_rows, write_parquet


def brightness(images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
    """Mean pixel value plus the length of the prompt."""
    return [float(np.asarray(image).mean()) + len(prompt) for image, prompt in zip(images, prompts, strict=True)]


class Brightness:
    """The same as a scorer of one's own."""

    name = "brightness"

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        return np.array(brightness(images, prompts))


@pytest.fixture
def table(tmp_path: Path) -> PairTable:
    return open_pairs(write_parquet(tmp_path / "pairs.parquet", pick_rows(40)))


def test_a_file_has_both_images_of_every_pair_in_stored_order(table: PairTable, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores.jsonl"
    assert score_pairs(table, "brightness", brightness, out) == (40, 0)
    scores = read_scores(out, "brightness")
    assert list(scores) == table.ids
    use_scores(table, scores, relabel=False, where="scores")
    for i in range(40):
        row = table[i]
        expected = brightness([row.chosen.open(), row.rejected.open()], [row.prompt] * 2)
        assert row.scores == pytest.approx(tuple(expected))


def test_relabelling_makes_the_higher_score_the_chosen_one(table: PairTable, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    score_pairs(table, "brightness", brightness, out)
    labels, identity = list(table.index.first), table.identity
    again = open_pairs(tmp_path / "pairs.parquet")
    scores = read_scores(out)
    scores[table.ids[0]] = (1.0, 1.0)  # equal: the label decides
    use_scores(again, scores, relabel=True, where="scores")
    assert again.index.first[0] == labels[0]
    assert list(again.index.first) != labels
    assert again.identity != identity  # so that a cache of the other labels is refused
    for i in range(40):
        chosen, rejected = again[i].scores
        assert chosen >= rejected
        sizes = [again[i].chosen.size(), again[i].rejected.size()]
        assert again.sizes[2 * i : 2 * i + 2] == sizes
    other = open_pairs(tmp_path / "pairs.parquet", DataSpec(invert_preference=True))
    use_scores(other, scores, relabel=True, where="scores")
    assert all(other[i].scores[0] <= other[i].scores[1] for i in range(40))


def test_scoring_goes_on_where_it_was_killed(table: PairTable, tmp_path: Path) -> None:
    calls: list[int] = []

    def killed(images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return brightness(images, prompts)

    out = tmp_path / "scores.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score_pairs(table, "brightness", killed, out)
    with out.open("a") as file:
        file.write('{"id": "half a li')
    with pytest.raises(DataError, match=r"has no scores for 8 of 40 pairs \(first: a32:b32, .* continues"):
        use_scores(table, read_scores(out), relabel=False, where="scores")
    assert score_pairs(table, "brightness", brightness, out) == (8, 0)
    assert list(read_scores(out)) == table.ids
    with pytest.raises(DataError, match="scores by brightness, and pickscore was requested"):
        score_pairs(table, "pickscore", brightness, out)


def test_an_image_that_does_not_open_has_no_score(tmp_path: Path) -> None:
    rows = pick_rows(3)
    rows[1]["jpg_0"] = rows[1]["jpg_0"][:200]  # a whole header, half an image
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))
    out = tmp_path / "scores.jsonl"
    assert score_pairs(table, "brightness", brightness, out) == (2, 1)
    assert all(math.isnan(value) for value in read_scores(out)[table.ids[1]])
    use_scores(table, read_scores(out), relabel=True, where="scores")
    assert [math.isnan(table[i].scores[0]) for i in range(3)] == [False, True, False]


def test_faults_are_named(table: PairTable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gave \(nan, .*\) to the images of .*pairs.parquet"):
        score_pairs(table, "broken", lambda images, prompts: [math.nan] * len(images), tmp_path / "nan.jsonl")
    with pytest.raises(DataError, match="there is no file of scores"):
        read_scores(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "a cat"}) + "\n")
    with pytest.raises(DataError, match="is not a file of scores"):
        read_scores(tmp_path / "other.jsonl")


def test_the_command_and_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffalign.config.schema import ConfigError, load_config
    from diffalign.training.open_data import open_table

    pairs = write_parquet(tmp_path / "pairs.parquet", pick_rows(5))
    out = tmp_path / "scores.jsonl"
    main(["data", "score", str(pairs), "--scorer", "tests.data.table.test_scores:Brightness", "--out", str(out)])
    assert "5 pairs, 5 of them scored now, 0 with an image" in capsys.readouterr().out
    config = tmp_path / "run.yaml"
    config.write_text(
        f"output_dir: {tmp_path}/out\nmodel: {{pretrained_model_name_or_path: x}}\n"
        "objective: {name: smpo, score_low: 0, score_high: 20}\n"
        f"data: {{path: {pairs}, relabel: true}}\n"
    )
    with pytest.raises(ConfigError, match=r"data\.relabel needs data\.scores"):
        load_config(config)
    table = open_table(load_config(config, [f"data.scores={out}"]))
    assert all(table[i].scores[0] >= table[i].scores[1] for i in range(5))
