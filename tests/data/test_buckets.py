"""Aspect buckets: the tables, which size a pair comes to, the order of the visits, and images from disk and cache."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN

from diffalign.cli.main import main
from diffalign.config.data_sections import BucketsSection
from diffalign.data.buckets.order import BucketOrder
from diffalign.data.buckets.sizes import SDXL, Shapes, bucket_of, cropped, in_buckets, kohya_sizes, lost, sdxl_sizes
from diffalign.data.cache.latents import CacheSpec, cache_key, open_cache
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.precompute.latents import encode_cache
from diffalign.data.precompute.recording import Work
from diffalign.data.row import DataError
from diffalign.data.sampler import Processes, positions_for
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.data.transforms import prepare_pair
from tests.conftest import ROOT
from tests.data.helpers import FakeEncoder, pick_rows, png, write_parquet
from tests.data.loader.test_offline_pairs import assert_same, joined

WIDE, TALL, SQUARE = (96, 48), (40, 80), (64, 64)
SECTION = BucketsSection(table="kohya", step=8)


def mixed(file: Path, other: tuple[int, int] = (90, 50), **first: object) -> PairTable:
    """Twelve pairs that are wide, tall and square in turn; `other` is the second side of a wide one."""
    rows = pick_rows(12)
    for i, row in enumerate(rows):
        row["jpg_0"] = png(i, (WIDE, TALL, SQUARE)[i % 3])
        row["jpg_1"] = png(100 + i, (other, TALL, SQUARE)[i % 3])
        row |= {"mask": first["mask"]} if "mask" in first else {}
    rows[0].update(first)
    return open_pairs(write_parquet(file, rows))


def buckets(table: PairTable) -> Shapes:
    return in_buckets(table, SECTION.name(), SECTION.sizes(32))


def test_sdxls_table_contains_what_diffusers_has_of_it() -> None:
    theirs = {(int(width), int(height)) for height, width in ASPECT_RATIO_1024_BIN.values()}
    assert theirs | {(1024, 1024)} <= {(w, h) for h, w in SDXL} | set(SDXL)
    assert len(SDXL) == len(set(SDXL)) == 40
    assert all(0.9 < width * height / 1024**2 < 1.07 and width % 64 == height % 64 == 0 for width, height in SDXL)
    assert sdxl_sizes(512)[0] == (256, 1024)
    with pytest.raises(DataError, match=r"set data\.resolution to a multiple of 128"):
        sdxl_sizes(576)


def test_kohyas_table_at_512_by_hand() -> None:
    """262,144 pixels over each width from 256 to 1024 in steps of 64, the height rounded down to a multiple of 64."""
    half = {(256, h) for h in (832, 896, 960, 1024)} | {(320, 704), (320, 768), (384, 640), (448, 576), (512, 512)}
    assert set(BucketsSection(table="kohya").sizes(512)) == half | {(h, w) for w, h in half}
    with pytest.raises(DataError, match="no sizes from 100 to 200 in steps of 64"):
        kohya_sizes(512, 64, 100, 200)
    with pytest.raises(ValueError, match="step belongs to table: kohya"):
        BucketsSection(table="sdxl", step=32)


def test_what_photographs_lose_to_cropping_is_what_the_documentation_says() -> None:
    said = (ROOT / "docs/data.md").read_text()
    ratios = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
    shares = []
    for sizes in (((1024, 1024),), sdxl_sizes(1024), *(kohya_sizes(1024, step, 512, 2048) for step in (64, 32))):
        shares.append(100 * sum(lost(r, sizes[bucket_of(r, r, sizes)]) for r in ratios) / len(ratios))
    square, sdxl, kohya, finer = (f"{share:.1f} %" for share in shares)
    assert square == f"{100 * 2 * (1 / 4 + 1 / 3 + 7 / 16) / 7:.1f} %"
    assert sdxl == kohya
    assert f"squares lose {square} of the pixels, SDXL's table and\nkohya's lose {sdxl}" in said
    assert f"`step: 32` loses {finer}" in said


def test_a_pair_comes_to_the_size_that_crops_it_least() -> None:
    sizes = ((32, 32), (48, 24), (24, 48), (64, 16))
    assert lost((100, 50), (32, 32)) == pytest.approx(0.5)
    assert lost((50, 100), (64, 16)) == pytest.approx(1 - 1 / 8)
    assert bucket_of((100, 50), (100, 50), sizes) == 1
    assert bucket_of((50, 100), (51, 100), sizes) == 2
    # 2:1 against 1:1: a square loses .5 + 0, the wide one 0 + .5, so the larger decides, and swapping changes nothing
    for pair in (((100, 50), (50, 50)), ((50, 50), (100, 50))):
        assert bucket_of(*pair, ((40, 20), (32, 32), (32, 16))) == 1
        assert bucket_of(*pair, ((64, 32), (32, 32))) == 0


def test_the_order_has_aligned_groups_of_one_bucket_and_leaves_no_pair_out() -> None:
    groups, size = [list(range(7)), [7, 8, 9, 10, 11], [12]], 3  # the last has fewer pairs than a group
    of = {index: bucket for bucket, group in enumerate(groups) for index in group}
    order = BucketOrder(groups, 5, size)
    visits = [order(position) for position in range(size * 130)]
    for start in range(0, len(visits), size):
        assert len({of[index] for index, _ in visits[start : start + size]}) == 1
    assert len(set(visits)) == len(visits)  # no two visits of a pair have one draw
    times = Counter(index for index, _ in visits)
    assert set(times) == set(of)
    assert max(times.values()) - min(times.values()) <= 2 * size  # 30 visits each, whatever the bucket
    assert all(sorted(draw for i, draw in visits if i == index) == list(range(times[index])) for index in of)
    again = BucketOrder(groups, 5, size)
    assert [again(position) for position in (200, 3, 7, 389)] == [visits[i] for i in (200, 3, 7, 389)]
    assert [BucketOrder(groups, 6, size)(p) for p in range(30)] != visits[:30]


def test_a_step_has_the_same_pairs_on_any_number_of_processes() -> None:
    one = positions_for(3, 4, 4).flatten().tolist()
    two = [positions_for(3, 4, 2, Processes(i, 2)) for i in range(2)]
    assert sorted(one) == sorted(torch.cat(two).flatten().tolist())
    assert all(row[0] % 4 == 0 for part in two for row in part.tolist())  # whole groups


def test_both_sides_come_to_the_size_with_their_true_geometry(tmp_path: Path) -> None:
    table = mixed(tmp_path / "pairs.parquet")
    shapes = buckets(table)
    assert [shapes[i] for i in range(3)] == [(40, 24), (24, 40), (32, 32)]
    pixels, geometry = prepare_pair(table[0], shapes[0], key=1, center_crop=True, random_flip=False)
    assert pixels.shape == (2, 3, 24, 40)
    # 96x48 becomes 48x24, of which 4 columns at each side are cropped; 90x50 becomes 43x24, of which 2 and 1 are
    assert {tuple(row) for row in geometry.tolist()} == {(48, 96, 0, 4, 24, 40), (50, 90, 0, 2, 24, 40)}


def test_the_cache_has_what_is_encoded_at_every_visit(tmp_path: Path) -> None:
    table = mixed(tmp_path / "pairs.parquet", WIDE, mask=[[0.0, 1.0]])
    shapes, encoder, seen = buckets(table), FakeEncoder(), []
    spec = CacheSpec(32, center_crop=False, random_flip=True, run_seed=3, variants=2, buckets=shapes)
    done = encode_cache(table, encoder, tmp_path / "cache", spec, Work(shard_bytes=20_000))
    assert done.shards_written > 2
    online = Online(encoder, 32, center_crop=False, random_flip=True, buckets=shapes)
    for content in (online, open_cache(tmp_path / "cache", done.key, shapes)):
        source = OfflinePairs(table, content, LoaderSpec(3, 2, with_uncond=True), time_ids=encoder.time_ids)
        seen.append(list(islice(source.batches(), 12)))
    for ours, cached in zip(*seen, strict=True):
        assert_same(joined([ours]), joined([cached]))
    assert len({batch.latents.shape[3:] for batch in seen[0]}) == 3
    with pytest.raises(DataError, match="buckets: the cache has 'kohya"):
        open_cache(tmp_path / "cache", cache_key(table, "fake-1", CacheSpec(32, center_crop=False, random_flip=True)))


def test_a_substitute_has_the_size_of_the_pair_that_it_stands_in_for(tmp_path: Path) -> None:
    table = mixed(tmp_path / "pairs.parquet", jpg_0=png(0, WIDE)[:300])  # a header, and no image
    source = OfflinePairs(table, Online(FakeEncoder(), 32, buckets=buckets(table)), LoaderSpec(3, 4, max_unreadable=1))
    assert {batch.pairs for batch in islice(source.batches(), 6)} == {4}
    assert source.problems


def test_the_only_pair_of_a_bucket_has_no_substitute(tmp_path: Path) -> None:
    rows = pick_rows(5)
    for row in rows[1:]:
        row["jpg_0"], row["jpg_1"] = png(1, SQUARE), png(2, SQUARE)
    rows[0] |= {"jpg_0": png(0, WIDE)[:300], "jpg_1": png(1, WIDE)}
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))
    source = OfflinePairs(table, Online(FakeEncoder(), 32, buckets=buckets(table)), LoaderSpec(3, 1))
    with pytest.raises(DataError, match="the only pair of the aspect bucket 40x24"):
        list(islice(source.batches(), 5))


def test_sizes_that_are_not_read_are_refused(tmp_path: Path) -> None:
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", pick_rows(3)), DataSpec(verify="none"))
    with pytest.raises(DataError, match="needs the sizes of the images"):
        buckets(table)


def test_the_report_draws_the_histogram_and_says_what_is_cropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = mixed(tmp_path / "pairs.parquet")
    with pytest.raises(SystemExit):
        main(["data", "check", str(tmp_path / "pairs.parquet"), "--aspect-buckets", "sdxl"])
    assert "--aspect-buckets needs --resolution" in capsys.readouterr().err
    main(["data", "check", str(tmp_path / "pairs.parquet"), "--resolution", "128", "--aspect-buckets", "sdxl"])
    said = capsys.readouterr().out
    shapes = in_buckets(table, "", sdxl_sizes(128))
    squares = (4 * (0.5 + 4 / 9) + 8 * 0.5 + 8 * 0) / 24
    assert f"{100 * cropped(table, shapes):.1f} % of the pixels are cropped, of squares {100 * squares:.1f} %" in said
    assert f"{'128x128':>10} {4:>8} ▇" in said
