"""Ranked lists of images kept as lists: which rows are usable, and the micro-batches of lists of several lengths."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.data.cache.latents import CacheSpec, open_cache
from diffalign.data.formats.arrow import object_columns
from diffalign.data.formats.rankings import ranked
from diffalign.data.loader.offline_pairs import LatentSource, OfflinePairs
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.precompute.latents import encode_cache
from diffalign.data.row import BAD_LABEL, BAD_ROW, IDENTICAL, MISSING_SIDE, TIE, DataError, ImageRef
from diffalign.data.spec import DataSpec
from diffalign.data.table.identity import data_identity
from diffalign.data.table.lists import ListTable, by_length, counted_lengths
from diffalign.data.table.open import open_columns, open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.report import check_pairs
from diffalign.types import PairBatch
from tests.data.helpers import FakeEncoder, pick_rows, png, write_parquet

LISTS = DataSpec(lists=True)


def rows(*lengths: int) -> list[dict[str, Any]]:
    """Rows with so many images each, the best of which is the last."""
    return [
        {
            "prompt": f"prompt {i}",
            "images": [png(10 * i + k) for k in range(length)],
            "ranking": [*range(length, 0, -1)],
        }
        for i, length in enumerate(lengths)
    ]


def listing(folder: Path, entries: list[dict[str, Any]]) -> Path:
    """The rows as a jsonl with images beside it."""
    for k in range(9):
        (folder / f"{k}.png").write_bytes(png(k))
    (folder / "lists.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    return folder / "lists.jsonl"


def stems(table: PairTable) -> list[list[str]]:
    return [[Path(str(ref.path)).stem for ref in table[i].images] for i in range(len(table))]


GOOD = {"prompt": "p", "images": ["0.png", "1.png", "2.png"], "ranking": [2, 3, 1]}


def test_one_file_as_lists_and_as_pairs(tmp_path: Path) -> None:
    scored = {"prompt": "q", "images": ["3.png", "4.png"], "scores": [0.2, 0.9]}
    file = listing(tmp_path, [GOOD])
    assert stems(open_pairs(file, LISTS)) == [["2", "0", "1"]]
    assert stems(open_pairs(file)) == [["0", "1"], ["2", "0"], ["2", "1"]]
    assert stems(open_pairs(file, DataSpec(pairs_of_ranking="best_worst"))) == [["2", "1"]]
    assert stems(open_pairs(file, DataSpec(lists=True, invert_preference=True))) == [["1", "0", "2"]]
    assert stems(open_pairs(listing(tmp_path, [scored]), LISTS)) == [["4", "3"]]
    named = {"prompt": "q", "pictures": ["3.png", "4.png"], "stars": [0.2, 0.9]}
    columns = {"images": "pictures", "scores": "stars"}
    assert stems(open_pairs(listing(tmp_path, [named]), DataSpec(lists=True, columns=columns))) == [["4", "3"]]
    (tmp_path / "test.json").write_text(json.dumps([{"prompt": "p", "image_path": GOOD["images"], "rank": [2, 3, 1]}]))
    assert stems(open_pairs(tmp_path / "test.json", LISTS)) == [["2", "0", "1"]]
    with pytest.raises(DataError, match="the objective compares whole lists, and no pairs are chosen"):
        open_pairs(listing(tmp_path, [GOOD]), DataSpec(lists=True, pairs_of_ranking="adjacent"))


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ({"images": ["0.png"], "ranking": [1]}, BAD_ROW, "1 ranked images"),
        ({"images": [f"{k}.png" for k in range(9)], "ranking": [*range(9)]}, BAD_ROW, "9 images, and a list has at m"),
        ({"ranking": [1, 2, 2]}, TIE, "images 1 and 2 are equally good"),
        ({"ranking": [1, 2]}, BAD_ROW, "3 images for 2 numbers of ranking"),
        ({"ranking": [1, 2, "x"]}, BAD_LABEL, "'x'; write a finite number"),
        ({"images": ["0.png", "1.png"], "ranking": [True, False]}, BAD_LABEL, "True; write a finite number"),
        ({"ranking": None}, BAD_ROW, "its order is None"),
        ({"images": ["0.png", "1.png", "x.png"]}, MISSING_SIDE, "image 2"),
        ({"images": ["0.png", "1.png", ""]}, MISSING_SIDE, "image 2 is empty"),
        ({"images": ["0.png", "1.png", "0.png"]}, IDENTICAL, "images 0 and 2 are the same image"),
        ({"images": "0.png"}, BAD_ROW, "write a list of images"),
    ],
)
def test_a_row_that_is_no_list_is_named(change: dict[str, Any], kind: str, reason: str, tmp_path: Path) -> None:
    table = open_pairs(listing(tmp_path, [GOOD | change, GOOD]), LISTS)
    assert stems(table) == [["2", "0", "1"]]
    (problem,) = table.problems
    assert (problem.where, problem.kind) == ("lists.jsonl line 1", kind)
    assert reason in problem.reason


def test_pairs_stay_pairs_where_other_columns_are_called_as_those_of_rankings(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "0.png", "rejected": "1.png", "images": ["2.png", "3.png"], "scores": [0.9, 0.1]}
    file = listing(tmp_path, [pair])
    for spec in (DataSpec(), LISTS):
        assert stems(open_pairs(file, spec)) == [["0", "1"]]
    (tmp_path / "pairs.json").write_text(json.dumps([pair]))
    assert stems(open_pairs(tmp_path / "pairs.json")) == [["0", "1"]]
    other = {"winner" if name == "chosen" else name: value for name, value in pair.items()}
    (tmp_path / "named.jsonl").write_text(json.dumps(other))
    winner = DataSpec(columns={"chosen": "winner", "rejected": "rejected"})
    assert stems(open_pairs(tmp_path / "named.jsonl", winner)) == [["0", "1"]]
    named = DataSpec(lists=True, columns={"images": "images", "scores": "scores"})
    assert stems(open_pairs(file, named)) == [["2", "3"]]


def test_lists_make_no_pairs_until_they_are_asked_for(tmp_path: Path) -> None:
    columns = ranked(open_columns(listing(tmp_path, [GOOD])))
    assert columns is not None
    assert "pairs" not in vars(columns)
    assert len(columns) == 3


def test_only_files_of_equal_length_are_read_to_compare_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = listing(tmp_path, [GOOD | {"images": ["0.png", "1.png", "long.png"]}]), []
    sizes = {f"{k}.png": (tmp_path / f"{k}.png").stat().st_size for k in range(2)}
    (tmp_path / "1.png").write_bytes(png(1).ljust(sizes["0.png"], b"\0"))
    (tmp_path / "0.png").write_bytes(png(0).ljust(sizes["1.png"], b"\0"))
    (tmp_path / "long.png").write_bytes(png(2) + b"\0" * 999)
    whole = ImageRef.read
    monkeypatch.setattr(ImageRef, "read", lambda ref: read.append(Path(str(ref.path)).stem) or whole(ref))
    assert len(open_pairs(file, LISTS)) == 1
    assert sorted(read) == ["0", "1"]


@pytest.mark.parametrize("made", [np.array, torch.tensor, lambda order: [np.int64(value) for value in order]])
def test_orders_of_numpy_and_torch_are_lists(made: Callable[[list[int]], Any]) -> None:
    given = [{"prompt": "p", "images": [png(k) for k in range(3)], "ranking": made([2, 3, 1])}]
    table = open_pairs(object_columns(given), LISTS)
    assert [ref.read() for ref in table[0].images] == [png(2), png(0), png(1)]


def test_true_and_false_are_no_ranks_of_pairs(tmp_path: Path) -> None:
    table = open_pairs(listing(tmp_path, [GOOD | {"images": ["0.png", "1.png"], "ranking": [True, False]}, GOOD]))
    assert [problem.kind for problem in table.problems] == [BAD_LABEL]


def test_pil_images_in_lists_are_encoded() -> None:
    images = [Image.open(io.BytesIO(png(k))) for k in range(3)]
    table = open_pairs(object_columns([{"prompt": "p", "images": images, "ranking": [2, 3, 1]}]), LISTS)
    assert [ref.open().tobytes() for ref in table[0].images] == [images[k].convert("RGB").tobytes() for k in (2, 0, 1)]


def test_two_orders_are_one_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = listing(tmp_path, [GOOD | {"scores": [3.0, 2.0, 1.0]}])
    with pytest.raises(DataError, match=r"columns names ranking 'ranking' .* and scores 'ranking'"):
        open_pairs(file, DataSpec(lists=True, columns={"ranking": "ranking", "scores": "ranking"}))
    assert stems(open_pairs(file, DataSpec(lists=True, columns={"scores": "scores"}))) == [["0", "1", "2"]]
    assert "the order is read from" not in caplog.text
    assert stems(open_pairs(file, LISTS)) == [["2", "0", "1"]]
    assert "the order is read from ranking, not from ['scores']" in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"human_preference": [1, 0]}, "human_preference [1, 0] and rank [2, 1] contradict each other"),
        ({"file_path": ["1.png", "2.png"]}, "image_path and file_path have different images"),
    ],
)
def test_an_entry_that_says_two_things_is_named(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    listing(tmp_path, [])
    entry = {"prompt": "p", "image_path": ["0.png", "1.png"], "rank": [2, 1]}
    agreeing = entry | {"human_preference": [0, 1], "file_path": ["0.png", "1.png"]}
    (tmp_path / "test.json").write_text(json.dumps([entry | change, agreeing]))
    table = open_pairs(tmp_path / "test.json", LISTS)
    assert stems(table) == [["1", "0"]]
    assert reason in table.problems[0].reason


def test_data_check_counts_lists(tmp_path: Path) -> None:
    tie = {**GOOD, "ranking": [1, 1, 2]}
    report = check_pairs(listing(tmp_path, [GOOD, GOOD | {"images": ["0.png", "1.png"], "ranking": [1, 2]}, tie]))
    assert "ranked lists  1 of 2, 1 of 3 images for an objective of lists; 1 x tie" in report.text()
    assert report.json()["ranked_lists"] == {"by_length": {2: 1, 3: 1}, "not_usable": {TIE: 1}}


def test_pairs_are_lists_of_two(tmp_path: Path) -> None:
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", pick_rows(3)), LISTS)
    assert not isinstance(table, ListTable)
    assert counted_lengths(table) == "3 of 2 images"
    assert by_length(table, 16) is None


def test_parts_and_identity_know_the_order(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "lists.parquet", rows(3, 2, 4))
    table = open_pairs(file, LISTS)
    turned = open_pairs(file, DataSpec(lists=True, invert_preference=True))
    assert table.identity != turned.identity
    assert data_identity(table)["sides"] != data_identity(turned)["sides"]
    part = table.part([2, 0])
    assert [part.count(i) for i in range(2)] == [4, 3]
    assert [ref.read() for ref in part[1].images] == [png(2), png(1), png(0)]
    assert counted_lengths(table) == "1 of 2, 1 of 3, 1 of 4 images"


def batches(table: PairTable, content: LatentSource, count: int, size: int = 2) -> list[PairBatch]:
    spec = LoaderSpec(run_seed=3, train_batch_size=size, with_uncond=True)
    time_ids = FakeEncoder().time_ids
    return list(islice(OfflinePairs(table, content, spec, time_ids=time_ids).batches(), count))


def test_a_micro_batch_has_lists_of_one_length_and_the_cache_has_them_all(tmp_path: Path) -> None:
    weighted = [row | {"weight": 1.0 + i} for i, row in enumerate(rows(3, 2, 3, 4, 2, 3))]
    table, encoder = open_pairs(write_parquet(tmp_path / "lists.parquet", weighted), LISTS), FakeEncoder()
    shapes = by_length(table, 16)
    online = Online(encoder, 16, center_crop=False, random_flip=True, buckets=shapes)
    found = batches(table, online, 6)
    seen = Counter(name for batch in found for name in batch.ids)
    lengths = {table.ids[i]: table.count(i) for i in range(6)}
    for batch in found:
        (length,) = {lengths[name] for name in batch.ids}
        assert batch.latents.shape[:2] == (length, 2)
        assert batch.cond.prompt_embeds.shape[0] == length
        assert batch.uncond is not None
        assert batch.uncond.prompt_embeds.shape[0] == length
        assert [1.0 + table.ids.index(name) for name in batch.ids] == batch.terms.weight.tolist()  # type: ignore[union-attr]
    assert seen.keys() == lengths.keys()
    spec = CacheSpec(16, center_crop=False, random_flip=True, run_seed=3, variants=9, buckets=shapes)
    made = encode_cache(table, encoder, tmp_path / "cache", spec)
    for one, two in zip(found, batches(table, open_cache(tmp_path / "cache", made.key, shapes), 6), strict=True):
        assert one.ids == two.ids
        torch.testing.assert_close(one.latents, two.latents, rtol=0, atol=1e-6)
        assert torch.equal(one.cond.time_ids, two.cond.time_ids)  # type: ignore[arg-type]
