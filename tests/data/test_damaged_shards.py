"""Shards are identified by their hash: a damaged one is named and computed again; NaN is never written."""

from __future__ import annotations

import json
import logging
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffalign.data.cache.latents import PairCache, open_cache
from diffalign.data.precompute.recording import Work
from diffalign.data.precompute.reference_errors import record_reference, reference_key
from diffalign.data.row import DataError
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.io import files
from diffalign.io.files import NoSpaceError
from diffalign.io.weight_files import stamp_fault
from diffalign.types import PairBatch
from tests.data.cache.test_latents import encode, needed
from tests.data.cache.test_trajectories import RANDOM, Inverter, made, source
from tests.data.helpers import FakeEncoder, pick_rows, write_parquet
from tests.training.test_damage import DAMAGE

OLD = Path(__file__).parents[1] / "golden/old_formats"
SHARD = "moments-00001.safetensors"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def table(tmp_path: Path) -> PairTable:
    return open_pairs(write_parquet(tmp_path / "pairs.parquet", pick_rows(7)))


@pytest.fixture
def cache(table: PairTable, tmp_path: Path) -> PairCache:
    encode(table, tmp_path / "cache", **RANDOM, variants=2)
    return open_cache(tmp_path / "cache", needed(table, **RANDOM))


@pytest.mark.parametrize("kind", [*DAMAGE, "zero page", "header"])
def test_a_damaged_shard_is_named_and_made_again(
    kind: str,
    table: PairTable,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "cache"
    encode(table, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    changed = bytearray(before[SHARD])
    if kind == "zero page":
        changed[-400:] = bytes(400)
    elif kind == "header":  # of the very hash
        place = changed.index(b"sha256") + 9
        changed[place : place + 1] = b"0" if changed[place : place + 1] != b"0" else b"1"
    (folder / SHARD).write_bytes(changed)
    if kind in DAMAGE:
        DAMAGE[kind](folder / SHARD)
    with caplog.at_level(logging.WARNING):
        done = encode(table, folder)
    assert (done.shards_written, done.shards_missing) == (1, 0)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert (f"{folder / SHARD} is damaged and is made again" in caplog.text) == (kind != "missing")


def test_a_damaged_recording_is_made_again_and_counts_once(
    table: PairTable,
    cache: PairCache,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, _ = made(table, cache, Inverter())
    file = folder / "trajectory-00002.safetensors"
    before = file.read_bytes()
    DAMAGE["bit"](file)
    again = Inverter()
    made(table, cache, again)
    assert f"{file} is damaged and is made again: it has another content" in caplog.text
    assert again.pairs == 4  # two pairs in two variants
    assert file.read_bytes() == before


@pytest.mark.parametrize("kind", ["bit", "nul", "empty"])
def test_a_damaged_manifest_is_refused(kind: str, table: PairTable, tmp_path: Path) -> None:
    encode(table, tmp_path / "cache")
    DAMAGE[kind](tmp_path / "cache/manifest.json")
    with pytest.raises(DataError, match=r"manifest\.json is (damaged|not a manifest).*; delete .* to have it made"):
        encode(table, tmp_path / "cache")


class Broken(FakeEncoder):
    """Not a number for the images of the third call, or for one prompt; or numbers that float16 has not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def moments(self, pixels: Tensor) -> Tensor:
        made = super().moments(pixels)
        if self.kind == "latents" and self.image_calls == 3:
            made[-1, 0, 0, 0] = torch.nan  # shards are made in an order of their own, so a batch may be short
        return made * 1e6 if self.kind == "range" else made

    def prompts(self, prompts: list[str]) -> object:
        made = super().prompts(prompts)
        if self.kind == "text" and "prompt 1" in prompts:
            made.prompt_embeds[prompts.index("prompt 1")] = torch.inf
        return made


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("latents", r"latents of pair a(\d):b\1 \(pairs\.parquet row \1\) are not finite.*pretrained_vae"),
        ("text", r"embeddings of the prompt 'prompt 1' are not finite.*another base"),
        (
            "range",
            r"latents of pair a(\d):b\1 \(pairs\.parquet row \1\) are beyond the range of cache_dtype float16",
        ),
    ],
)
def test_values_that_are_not_finite_do_not_enter(kind: str, words: str, table: PairTable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        encode(
            table,
            tmp_path / "cache",
            Broken(kind),
            batch_size=2,
            dtype="float16" if kind == "range" else "float32",
            shard_bytes=2000 if kind != "range" else 1000,
        )
    for file in (tmp_path / "cache").glob("moments-*"):
        assert stamp_fault(file) is None
    assert not list((tmp_path / "cache").glob(".*"))


def test_recordings_that_are_not_finite_are_not_kept(table: PairTable, cache: PairCache) -> None:
    class Diverging(Inverter):
        def __call__(self, batch: PairBatch) -> Tensor:
            return super().__call__(batch) * (torch.inf if self.pairs > 4 else 1.0)

    with pytest.raises(DataError, match=r"trajectory of pair a(\d):b\1 \(pairs\.parquet row \1\) is not finite"):
        made(table, cache, Diverging())

    def errors(batch: PairBatch) -> Tensor:
        return torch.full((2, batch.pairs), torch.nan)

    pairs = source(table, cache)
    with pytest.raises(DataError, match=r"reference's error of pair a0:b0 .* is not finite and is not stored"):
        record_reference(pairs, reference_key(pairs, {}), errors, 1, Work())


def test_a_full_disk_is_named_before_and_while_shards_are_written(
    table: PairTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda _: Usage(1 << 40, 0, 1000))
        with pytest.raises(NoSpaceError, match=rf"no space for the latent cache at {folder}: about 1\.0 MiB needed, 1"):
            encode(table, folder)
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        patch.setattr("diffalign.data.cache.shards.save_file", lambda *a, **k: (_ for _ in ()).throw(full))
        with pytest.raises(NoSpaceError, match=r"no space for a shard of the cache at .*text-0.*data\.cache_dir"):
            encode(table, folder)
    assert [file.name for file in folder.iterdir()] == ["manifest.json"]
    assert encode(table, folder).shards_missing == 0


def test_a_cache_of_before_there_were_hashes_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Written by the code of commit 9320911."""
    pairs = open_pairs(write_parquet(tmp_path / "four.parquet", pick_rows(4)))
    folder = shutil.copytree(OLD / "cache", tmp_path / "cache")
    assert encode(pairs, folder).shards_written == 0
    assert "2 shards in " in caplog.text
    assert "have no hashes" in caplog.text
    encode(pairs, tmp_path / "new")
    old, new = open_cache(folder, needed(pairs)), open_cache(tmp_path / "new", needed(pairs))
    for index in range(4):
        assert all(torch.equal(a, b) for a, b in zip(old.moments(index, 0), new.moments(index, 0), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(old.text(index), new.text(index), strict=True))
    (folder / SHARD).write_bytes(b"")
    encode(pairs, folder)  # what shows in header and size is repaired here as well
    assert "moments-00001.safetensors is damaged and is made again: it has no readable header" in caplog.text
    assert "sha256" in json.loads((folder / SHARD).read_bytes()[8:].split(b"}}")[0] + b"}}")["__metadata__"]
