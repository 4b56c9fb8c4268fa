"""Weight, margin and mask of a pair: read from every format, cropped and flipped with the images, checked."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.data.cache.latents import CacheSpec, open_cache
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.precompute.latents import encode_cache
from diffalign.data.row import BAD_TERM, DataError, ImageError
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.report import check_pairs
from diffalign.data.weights import on_latents, read_mask, shares
from diffalign.types import PairBatch
from tests.data.helpers import FakeEncoder, pick_rows, png, write_jsonl, write_parquet

GRID = [[1.0, 0.0, -1.0], [0.5, 0.25, -0.5]]
TERMS: dict[str, Any] = {"weight": 0.5, "margin": -2.0, "mask": GRID}
SQUARE = torch.tensor([16, 16, 0, 0, 16, 16]).expand(2, 6)  # geometry of images that are their own crop


def batches(table: PairTable, **options: Any) -> OfflinePairs:
    settings: dict[str, Any] = {"run_seed": 3, "train_batch_size": 2} | options
    content = Online(FakeEncoder(), 16, center_crop=False, random_flip=True)
    return OfflinePairs(table, settings.pop("content", content), LoaderSpec(**settings))


def take(source: OfflinePairs, count: int) -> list[PairBatch]:
    return list(islice(source.batches(), count))


def box(pixels: np.ndarray, side: int) -> Tensor:
    """PIL's average over boxes."""
    return torch.from_numpy(np.array(Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX)))


@pytest.mark.parametrize(
    ("start", "length", "cells", "parts", "expected"),
    [
        (0.0, 1.0, 4, 2, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
        (0.0, 1.0, 2, 3, [[1, 0], [0.5, 0.5], [0, 1]]),
        (0.5, 0.5, 2, 2, [[0, 1], [0, 1]]),
        (0.25, 0.5, 2, 1, [[0.5, 0.5]]),
        (0.0, 1.0, 3, 3, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    ],
)
def test_shares_by_hand(start: float, length: float, cells: int, parts: int, expected: list[list[float]]) -> None:
    torch.testing.assert_close(shares(start, length, cells, parts), torch.tensor(expected, dtype=torch.float64))


def test_a_grid_of_the_latents_size_is_the_mask_and_ones_stay_ones() -> None:
    grid = torch.randint(-4, 5, (8, 8), generator=torch.Generator().manual_seed(0)).double() / 4
    assert torch.equal(on_latents(grid, SQUARE, flip=False, factor=2, where="row 0"), grid.float())
    assert torch.equal(on_latents(grid, SQUARE, flip=True, factor=2, where="row 0"), grid.float().flip(-1))
    for shape in ((1, 1), (3, 7), (50, 31)):
        ones = on_latents(torch.ones(shape, dtype=torch.float64), SQUARE, flip=False, factor=2, where="row 0")
        assert torch.equal(ones, torch.ones(8, 8))


def test_areas_are_those_of_pils_box_filter() -> None:
    """A grid of one value a pixel, cropped and averaged as PIL does it, from an image that needs no resizing."""
    values = np.random.default_rng(0).uniform(-1, 1, (16, 40)).astype(np.float32)
    geometry = torch.tensor([16, 40, 0, 11, 16, 16]).expand(2, 6)
    for side in (2, 4, 8, 16):
        got = on_latents(torch.from_numpy(values).double(), geometry, flip=False, factor=16 // side, where="row 0")
        torch.testing.assert_close(got, box(values[:, 11:27], side), rtol=1e-5, atol=1e-5)
    mirrored = torch.tensor([16, 40, 0, 40 - 16 - 11, 16, 16]).expand(2, 6)  # as prepare_pair has it
    got = on_latents(torch.from_numpy(values).double(), mirrored, flip=True, factor=4, where="row 0")
    torch.testing.assert_close(got, box(np.ascontiguousarray(values[:, 11:27][:, ::-1]), 4), rtol=1e-5, atol=1e-5)


def painted(file: Path, n: int, size: tuple[int, int]) -> Path:
    """Pairs whose chosen image is their mask: grey g stands for g / 127.5 - 1."""
    rows = pick_rows(n)
    for i, row in enumerate(rows):
        grey = np.random.default_rng(i).integers(0, 256, size).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(np.repeat(grey[..., None], 3, axis=2)).save(stream, "PNG")
        row[f"jpg_{1 - i % 2}"] = stream.getvalue()  # label_0 = i % 2
        other = f"jpg_{i % 2}"
        row[other] = png(100 + i, (size[1], size[0]))
        row["mask"] = (grey / 127.5 - 1).tolist()
    return write_parquet(file, rows)


def test_masks_follow_crop_and_flip_of_their_images(tmp_path: Path) -> None:
    """Many visits of images that are their own masks: the encoder's mean is then the mask, place by place."""
    table = open_pairs(painted(tmp_path / "pairs.parquet", 3, (16, 40)))
    encoder = FakeEncoder()
    source = OfflinePairs(table, Online(encoder, 16, center_crop=False, random_flip=True), LoaderSpec(3, 3))
    seen = []
    for position in range(24):
        loaded = source.visits.__getitems__([position])
        assert loaded.pixels is not None
        assert loaded.terms.mask is not None
        mean = encoder.moments(loaded.pixels[0])[0, 0]
        torch.testing.assert_close(loaded.terms.mask[0], mean, rtol=0, atol=1e-5)
        seen.append(mean)
    assert len({tuple(x.flatten().tolist()) for x in seen}) > 20  # crops differ


def test_the_cache_gives_the_terms_of_the_pixels(tmp_path: Path) -> None:
    table = open_pairs(painted(tmp_path / "pairs.parquet", 5, (16, 40)))
    spec = CacheSpec(16, center_crop=False, random_flip=True, run_seed=3, variants=4, dtype="float32")
    done = encode_cache(table, FakeEncoder(), tmp_path / "cache", spec)
    cache = open_cache(tmp_path / "cache", done.key)
    online, cached = take(batches(table), 8), take(batches(table, content=cache), 8)
    for one, other in zip(online, cached, strict=True):
        assert one.terms.mask is not None
        assert other.terms.mask is not None
        assert torch.equal(one.terms.mask, other.terms.mask)
        assert one.terms.mask.shape == (2, 4, 4)
        torch.testing.assert_close(one.latents, other.latents)


def parquet(folder: Path) -> Path:
    return write_parquet(folder / "pairs.parquet", [row | TERMS for row in pick_rows(3)])


def jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "pairs.jsonl", 3, **TERMS)


def csv(folder: Path) -> Path:
    write_jsonl(folder / "pairs.jsonl", 3)
    lines = ["prompt,chosen,rejected,weight,margin,mask"]
    lines += [f'p,images/{i}c.png,images/{i}r.png,0.5,-2.0,"{json.dumps(GRID)}"' for i in range(3)]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def folder_of_pairs(folder: Path) -> Path:
    for side, seed in (("chosen", 0), ("rejected", 10)):
        (folder / "pairs" / side).mkdir(parents=True)
        for i in range(3):
            (folder / "pairs" / side / f"{i}.png").write_bytes(png(seed + i))
    lines = [json.dumps({"name": str(i), "prompt": "p", **TERMS}) for i in range(3)]
    (folder / "pairs" / "captions.jsonl").write_text("\n".join(lines))
    return folder / "pairs"


def hpdv2(folder: Path) -> Path:
    for i in range(2):
        (folder / f"{i}.png").write_bytes(png(i))
    entry = {"prompt": "p", "image_path": ["0.png", "1.png"], "human_preference": [0, 1], **TERMS}
    (folder / "train.json").write_text(json.dumps([entry]))
    return folder / "train.json"


def tar(folder: Path, ending: str = "txt") -> Path:
    with tarfile.open(folder / "0000.tar", "w") as shard:
        for i in range(2):
            members = {"original_prompt.txt": b"p", "jpg_0.png": png(2 * i), "jpg_1.png": png(2 * i + 1)}
            members |= {"label_0.txt": b"1", "weight.txt": b"0.5", "margin.txt": b"-2.0"}
            members[f"mask.{ending}"] = json.dumps(GRID).encode()
            for name, data in members.items():
                info = tarfile.TarInfo(f"{i}.{name}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    return folder / "0000.tar"


def tar_of_json(folder: Path) -> Path:
    return tar(folder, "json")


def saved(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([row | TERMS for row in pick_rows(3)]).save_to_disk(str(folder / "saved"))
    return folder / "saved"


FORMATS = (parquet, jsonl, csv, folder_of_pairs, hpdv2, tar, tar_of_json, saved)


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_every_format_has_them(make: Callable[[Path], Path], tmp_path: Path) -> None:
    table = open_pairs(make(tmp_path))
    assert len(table) > 0
    assert table.problems == []
    assert table.terms == ("weight", "margin", "mask")
    assert table.negative_masks
    for i in range(len(table)):
        assert (table.number("weight", i), table.number("margin", i)) == (0.5, -2.0)
        assert table.mask(i).tolist() == GRID  # type: ignore[union-attr]
    batch = take(batches(table), 1)[0]
    assert batch.terms.weight is not None
    assert batch.terms.margin is not None
    assert batch.terms.mask is not None
    assert (batch.terms.weight.tolist(), batch.terms.margin.tolist()) == ([0.5, 0.5], [-2.0, -2.0])
    assert batch.terms.mask.shape == (2, 4, 4)
    assert batch.terms.mask.dtype == torch.float32


def test_data_without_them_have_none(tmp_path: Path) -> None:
    batch = take(batches(open_pairs(write_parquet(tmp_path / "pairs.parquet", pick_rows(3)))), 1)[0]
    assert (batch.terms.weight, batch.terms.margin, batch.terms.mask) == (None, None, None)


def test_empty_cells_are_neutral(tmp_path: Path) -> None:
    rows = [row | TERMS for row in pick_rows(2)]
    rows[1] |= dict.fromkeys(TERMS)
    batch = take(batches(open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))), 1)[0]
    i = batch.ids.index("a1:b1")
    assert batch.terms.weight is not None
    assert batch.terms.margin is not None
    assert batch.terms.mask is not None
    assert (batch.terms.weight[i].item(), batch.terms.margin[i].item()) == (1.0, 0.0)
    assert torch.equal(batch.terms.mask[i], torch.ones(4, 4))
    assert batch.terms.weight[1 - i].item() == 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": -1.0}, "weight is -1.0; write a finite number, 0 or more"),
        ({"weight": "much"}, "weight is 'much'"),
        ({"margin": "nan"}, "margin is 'nan'; write a finite number, or leave it empty"),
        ({"mask": [[0.0, 1.5]]}, "mask has values from 0 to 1.5; write rows of numbers in [-1, 1]"),
        ({"mask": [[0.0, 1.0], [1.0]]}, "mask is not a grid of numbers"),
        ({"mask": [0.0, 1.0]}, "mask is not a grid of numbers"),
        ({"mask": []}, "mask has the shape (0,)"),
        ({"mask": "masks/0.png"}, "mask is not a grid of numbers"),
        ({"mask": [[float("nan")]]}, "mask has values from nan"),
    ],
)
def test_bad_ones_are_named_and_left_out(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", 3, **TERMS)
    lines = file.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | change)
    file.write_text("\n".join(lines))
    table = open_pairs(file)
    assert len(table) == 2
    (problem,) = table.problems
    assert (problem.where, problem.kind, problem.dropped) == ("pairs.jsonl line 2", BAD_TERM, True)
    assert words in problem.reason


def test_unlooked_at_masks_are_replaced_when_bad(tmp_path: Path) -> None:
    """With verify="none" the fault is met in training, as one of an image would be."""
    file = write_jsonl(tmp_path / "pairs.jsonl", 30, mask=[[1.0]])
    file.write_text(file.read_text().replace('"mask": [[1.0]]', '"mask": [[2.0]]', 1))
    source = batches(open_pairs(file, DataSpec(verify="none")))
    take(source, 15)
    assert [problem.kind for problem in source.problems] == [BAD_TERM]


def test_a_mask_needs_images_of_one_shape() -> None:
    geometry = torch.tensor([[16, 24, 0, 4, 16, 16], [24, 16, 4, 0, 16, 16]])
    with pytest.raises(
        ImageError, match="a mask needs images of the same shape, and these have 24x16 and 16x24 pixels"
    ):
        on_latents(torch.ones(2, 2).double(), geometry, flip=False, factor=4, where="row 0")
    same = torch.tensor([[16, 24, 0, 4, 16, 16], [32, 48, 0, 4, 16, 16]])
    on_latents(torch.ones(2, 2).double(), same, flip=False, factor=4, where="row 0")


def test_negative_masks_stop_a_run_that_cannot_use_them(tmp_path: Path) -> None:
    table = open_pairs(write_jsonl(tmp_path / "pairs.jsonl", 3, mask=GRID), DataSpec(verify="none"))
    with pytest.raises(DataError, match="its mask goes below 0"):
        take(batches(table, signed_masks=False), 1)
    take(batches(table), 1)


def test_a_column_can_be_left_out_or_have_another_name(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", 2, weight="not mine", gap=3.0)
    table = open_pairs(file, DataSpec(columns={"weight": "", "margin": "gap"}))
    assert (len(table), table.terms) == (2, ("margin",))
    assert table.number("margin", 0) == 3.0
    with pytest.raises(DataError, match="columns maps chosen to ''"):
        open_pairs(file, DataSpec(columns={"chosen": ""}))


def test_relabelling_pairs_with_margins_or_masks_is_refused(tmp_path: Path) -> None:
    table = open_pairs(write_jsonl(tmp_path / "pairs.jsonl", 2, margin=1.0))
    with pytest.raises(DataError, match="require the original labels"):
        table.take_scores([(0.0, 1.0)] * 2, relabel=True)
    table.take_scores([(0.0, 1.0)] * 2, relabel=False)


def test_the_report_names_them(tmp_path: Path) -> None:
    report = check_pairs(write_jsonl(tmp_path / "pairs.jsonl", 2, **TERMS))
    assert "pair terms    weight (column weight), margin (column margin), mask (column mask)" in report.text()


def test_masks_as_text_bytes_and_arrays_are_the_same() -> None:
    for cell in (GRID, json.dumps(GRID), json.dumps(GRID).encode(), np.array(GRID), torch.tensor(GRID)):
        assert read_mask(cell, "row 0").tolist() == GRID
