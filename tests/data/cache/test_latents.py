"""The latent cache: equal to encoding online, without model calls, resumable, and refused if it is for other data."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from diffalign.data.cache.latents import CacheKey, CacheSpec, PairCache, cache_key, open_cache
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.precompute.latents import Encoded, encode_cache
from diffalign.data.precompute.recording import Work
from diffalign.data.row import DataError
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.io.mapped_tensors import MappedTensors
from diffalign.types import PairBatch
from tests.data.helpers import FakeEncoder, pick_rows, png, write_jsonl, write_parquet
from tests.data.loader.test_offline_pairs import assert_same, joined

SHARD = 2000  # bytes: one pair of 16 px in float32 has 768, so two pairs a shard
SHAPE: dict[str, Any] = {"resolution": 16, "center_crop": True, "random_flip": False}
RANDOM: dict[str, Any] = {"resolution": 16, "center_crop": False, "random_flip": True}


@pytest.fixture
def table(tmp_path: Path) -> PairTable:
    return open_pairs(write_parquet(tmp_path / "pairs.parquet", pick_rows(7)))


def encode(table: PairTable, folder: Path, encoder: FakeEncoder | None = None, **options: Any) -> Encoded:
    spec = {name: options.pop(name) for name in ("variants", "dtype", "run_seed", *SHAPE) if name in options}
    made = CacheSpec(**({**SHAPE, "run_seed": 3} | spec))
    return encode_cache(table, encoder or FakeEncoder(), folder, made, Work(**({"shard_bytes": SHARD} | options)))


def needed(table: PairTable, **options: Any) -> CacheKey:
    return cache_key(table, "fake-1", CacheSpec(**({**SHAPE, "run_seed": 3} | options)))


def batches(table: PairTable, content: Online | PairCache, count: int, **options: Any) -> list[PairBatch]:
    settings: dict[str, Any] = {"run_seed": 3, "train_batch_size": 2, "with_uncond": True} | options
    time_ids = FakeEncoder(times=settings.pop("times", True)).time_ids
    return list(islice(OfflinePairs(table, content, LoaderSpec(**settings), time_ids=time_ids).batches(), count))


@pytest.mark.parametrize("options", [{}, {"prompt_dropout": 0.3}, {"num_workers": 2}])
@pytest.mark.parametrize("sdxl", [True, False])
def test_cached_batches_equal_online_batches(
    table: PairTable, tmp_path: Path, sdxl: bool, options: dict[str, Any]
) -> None:
    """Two epochs with two variants: every visit of random crops and flips agrees bitwise."""
    encoder = FakeEncoder(pooled=sdxl, times=sdxl)
    encode(table, tmp_path / "cache", encoder, **RANDOM, variants=2)
    cache = open_cache(tmp_path / "cache", needed(table, **RANDOM))
    online = batches(table, Online(encoder, **RANDOM), 7, times=sdxl, **options)
    cached = batches(table, cache, 7, times=sdxl, **options)
    assert_same(joined(online), joined(cached))
    assert [batch.ids for batch in online] == [batch.ids for batch in cached]
    assert (cached[0].cond.pooled is None) == (not sdxl)


def test_the_variant_comes_back_after_k_visits_with_a_fresh_latent(table: PairTable, tmp_path: Path) -> None:
    encode(table, tmp_path / "cache", **RANDOM, variants=2)
    cache = open_cache(tmp_path / "cache", needed(table, **RANDOM))
    seen = joined(batches(table, cache, 3, train_batch_size=7))
    by_id = [name for batch in batches(table, cache, 3, train_batch_size=7) for name in batch.ids]
    for name in table.ids:
        first, second, third = (i for i, each in enumerate(by_id) if each == name)
        assert torch.equal(seen["cond.time_ids"][first], seen["cond.time_ids"][third])
        assert not torch.equal(seen["latents"][first], seen["latents"][third])
        assert not torch.equal(seen["latents"][first], seen["latents"][second])


def test_reading_the_cache_calls_no_model(table: PairTable, tmp_path: Path) -> None:
    encoder = FakeEncoder()
    encode(table, tmp_path / "cache", encoder)
    calls, prompts = encoder.image_calls, list(encoder.prompts_seen)
    for i in range(7):
        for side in ("chosen", "rejected"):
            assert getattr(table[i], side).data is not None
    (tmp_path / "pairs.parquet").unlink()  # nor are the images needed any more
    batches(table, open_cache(tmp_path / "cache", needed(table)), 7)
    assert (encoder.image_calls, encoder.prompts_seen) == (calls, prompts)


def test_prompts_are_encoded_once_each(table: PairTable, tmp_path: Path) -> None:
    encoder = FakeEncoder()
    encode(table, tmp_path / "cache", encoder)
    assert sorted(encoder.prompts_seen) == ["", "", "prompt 0", "prompt 1", "prompt 2"]  # "" first asks for shapes


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_smaller_dtypes_are_close_and_half_the_size(
    table: PairTable, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    encode(table, tmp_path / "full", shard_bytes=1 << 20)
    encode(table, tmp_path / "half", shard_bytes=1 << 20, dtype=dtype)
    full = joined(batches(table, open_cache(tmp_path / "full", needed(table)), 4))
    half = joined(batches(table, open_cache(tmp_path / "half", needed(table)), 4))
    assert half["latents"].dtype == torch.float32
    torch.testing.assert_close(half["latents"], full["latents"], rtol=0, atol=4 * tolerance)
    with safe_open(tmp_path / "half" / "moments-00000.safetensors", "pt") as shard:
        assert shard.get_tensor("moments").dtype == getattr(torch, dtype)


STALE: dict[str, tuple[Callable[[CacheKey], CacheKey], str]] = {
    "encoder": (lambda key: replace(key, encoder="other"), "encoder: the cache has 'fake-1', this run needs 'other'"),
    "resolution": (lambda key: replace(key, resolution=32), "resolution: the cache has 16, this run needs 32; set"),
    "crop": (lambda key: replace(key, center_crop=False), "center_crop: the cache has True, this run needs False"),
    "flip": (lambda key: replace(key, random_flip=True), "random_flip: the cache has False, this run needs True"),
    "seed": (lambda key: replace(key, run_seed=3), "run_seed: the cache has None, this run needs 3; random crops"),
    "variants": (lambda key: replace(key, variants=2), "variants: the cache has 1, this run needs 2"),
    "dtype": (lambda key: replace(key, dtype="float16"), "dtype: the cache has 'float32', this run needs 'float16'"),
    "version": (lambda key: replace(key, format_version=9), "format_version: the cache has 1, this run needs 9"),
}


@pytest.mark.parametrize("field", STALE)
def test_a_stale_cache_is_refused_by_field(table: PairTable, tmp_path: Path, field: str) -> None:
    change, message = STALE[field]
    encode(table, tmp_path / "cache")
    open_cache(tmp_path / "cache", needed(table))
    with pytest.raises(DataError) as caught:
        open_cache(tmp_path / "cache", change(needed(table)))
    assert message in str(caught.value)
    assert str(caught.value).count("\n") == 1  # this field and no other


def test_a_cache_of_random_crops_is_refused_where_nothing_is_random(table: PairTable, tmp_path: Path) -> None:
    encode(table, tmp_path / "cache", **RANDOM)
    with pytest.raises(DataError, match=r"\n  run_seed: the cache has 3, this run needs None"):
        open_cache(tmp_path / "cache", replace(needed(table, **RANDOM), run_seed=None))


def test_other_data_are_refused(table: PairTable, tmp_path: Path) -> None:
    encode(table, tmp_path / "cache")
    file = tmp_path / "pairs.parquet"
    for other in (open_pairs(file, DataSpec(invert_preference=True)), open_pairs(file, DataSpec(max_pairs=6))):
        with pytest.raises(DataError, match=r"dataset: the cache has .*pairs, prompts, labels"):
            open_cache(tmp_path / "cache", needed(other))
    rows = pick_rows(7)
    rows[0]["caption"] = "another"
    changed = open_pairs(write_parquet(tmp_path / "changed.parquet", rows))
    with pytest.raises(DataError, match="dataset: the cache has"):
        open_cache(tmp_path / "cache", needed(changed))
    cache = open_cache(tmp_path / "cache", needed(table))
    with pytest.raises(DataError, match="has 7 pairs and the table 6"):
        batches(open_pairs(file, DataSpec(max_pairs=6)), cache, 1)


def test_the_same_data_elsewhere_are_accepted(table: PairTable, tmp_path: Path) -> None:
    encode(table, tmp_path / "cache")
    moved = open_pairs(write_parquet(tmp_path / "moved" / "renamed.parquet", pick_rows(7), row_group_size=7))
    open_cache(tmp_path / "cache", needed(moved))


def test_a_changed_image_file_of_the_same_size_makes_the_cache_stale(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", 3)
    encode(open_pairs(file), tmp_path / "cache")
    open_cache(tmp_path / "cache", needed(open_pairs(file, DataSpec(verify="full"))))
    (tmp_path / "images" / "1c.png").write_bytes(png(99))
    assert len({image.stat().st_size for image in (tmp_path / "images").iterdir()}) == 1
    with pytest.raises(DataError, match=r"dataset: the cache has .*order or image files differ: use the data settings"):
        open_cache(tmp_path / "cache", needed(open_pairs(file)))


def test_encoding_into_a_cache_of_something_else_is_refused(table: PairTable, tmp_path: Path) -> None:
    encode(table, tmp_path / "cache")
    with pytest.raises(DataError, match=r"a different latent cache; delete it.*\n  resolution: the cache has 16"):
        encode(table, tmp_path / "cache", resolution=32)
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(DataError, match="but no manifest"):
        encode(table, tmp_path / "cache")


def test_missing_and_damaged_manifests(table: PairTable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="contains no latent cache"):
        open_cache(tmp_path / "nothing", needed(table))
    (tmp_path / "manifest.json").write_text(json.dumps({"key": {"colour": "red"}}))
    with pytest.raises(DataError, match="not a manifest of this version"):
        open_cache(tmp_path, needed(table))


def test_useless_variants_and_unknown_dtypes_are_refused(table: PairTable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="variants=2; with center_crop and without random_flip"):
        encode(table, tmp_path / "cache", variants=2)
    with pytest.raises(DataError, match="dtype='fp8'; a cache is stored as float32, float16, bfloat16"):
        encode(table, tmp_path / "cache", dtype="fp8")
    assert not (tmp_path / "cache").exists()


def test_unreadable_pairs_are_substituted_as_online(tmp_path: Path) -> None:
    rows = pick_rows(40)
    rows[5]["jpg_0"] = png(10, (64, 64))[:6000]
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))
    result = encode(table, tmp_path / "cache", num_workers=1)
    assert [(p.where, p.kind) for p in result.problems] == [("pairs.parquet row 5", "corrupt image")]
    cached = OfflinePairs(
        table,
        open_cache(tmp_path / "cache", needed(table)),
        LoaderSpec(3, 4),
        time_ids=FakeEncoder().time_ids,
    )
    online = OfflinePairs(table, Online(FakeEncoder(), 16), LoaderSpec(3, 4))
    assert_same(joined(list(islice(cached.batches(), 20))), joined(list(islice(online.batches(), 20))))
    assert cached.problems == online.problems == list(result.problems)


def test_opening_reads_the_manifest_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs of the cache object do not grow with the pairs: no shard is opened at start, few are held later."""
    table = open_pairs(write_jsonl(tmp_path / "pairs.jsonl", 30), DataSpec(verify="none"))
    encode(table, tmp_path / "cache", shard_bytes=1)
    opened: list[str] = []
    monkeypatch.setattr(
        "diffalign.data.cache.shards.MappedTensors", lambda file: opened.append(file.name) or MappedTensors(file)
    )
    monkeypatch.setattr("diffalign.data.cache.shards.OPEN_SHARDS", 4)
    cache = open_cache(tmp_path / "cache", needed(table))
    assert opened == []
    assert len(pickle.dumps(cache)) < 2000
    for index in range(30):
        cache.load(index, key=1, draw=0, prompt="p")
    assert len(cache._shards) == 4
    assert len(opened) < 100
