"""Winners: rows of a prompt and an image, or the chosen side of pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.data.row import DataError
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.winners import open_winners
from diffalign.data.transforms import prepare_images, prepare_pair


@pytest.fixture
def listing(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "torn.png").write_bytes(b"no picture")
    rows = [{"text": f"prompt {i}", "file_name": f"{i}.png"} for i in range(3)]
    rows += [{"text": " ", "file_name": "0.png"}, {"text": "torn", "file_name": "torn.png"}, rows[1]]
    rows += [{"text": "gone", "file_name": "gone.png"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "metadata.jsonl"


def test_rows_of_a_prompt_and_an_image(listing: Path) -> None:
    table = open_winners(listing)
    assert table.prompts == ["prompt 0", "prompt 1", "prompt 2", "prompt 1"]
    assert [problem.kind for problem in table.problems] == [
        "empty prompt",
        "corrupt image",
        "duplicate id",
        "missing side",
    ]
    assert table.ids[3] == table.ids[1] + "#2"
    assert table.chosen(2).open().size == (30, 40)
    assert open_winners(listing, DataSpec(max_pairs=2)).prompts == ["prompt 0", "prompt 1"]
    assert open_winners(listing, DataSpec(verify="none")).ids[:3] == table.ids[:3]
    assert open_winners(listing.parent).identity == table.identity
    named = open_winners(listing, DataSpec(columns={"prompt": "file_name", "image": "file_name"}))
    assert named.prompts[0] == "0.png"


def test_the_chosen_side_of_pairs(pair_folder: Path) -> None:
    winners, pairs = open_winners(pair_folder), open_pairs(pair_folder)
    assert winners.ids == pairs.ids
    assert winners.chosen(5).read() == pairs[5].chosen.read()


@pytest.mark.parametrize("random", [False, True])
def test_a_winner_is_prepared_as_in_a_pair(random: bool, pair_folder: Path) -> None:
    row = open_pairs(pair_folder)[3]
    for key in range(3):
        settings = {"key": key, "center_crop": not random, "random_flip": random}
        pixels, geometry = prepare_images([row.chosen], (32, 32), **settings)
        both, boxes = prepare_pair(row, (32, 32), **settings)
        assert torch.equal(pixels[0], both[0])
        assert torch.equal(geometry[0], boxes[0])


def test_what_holds_no_winners_says_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "video": "b.mp4"}\n')
    with pytest.raises(DataError, match="winners alone need a prompt"):
        open_winners(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "image": "b.png"}\n')
    with pytest.raises(DataError, match="none of the 1 rows is usable"):
        open_winners(tmp_path / "b.jsonl")
