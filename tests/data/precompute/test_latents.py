"""Writing the latent cache: after an interruption, by several processes, by independent runs."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from diffalign.data.cache.latents import open_cache
from diffalign.data.precompute.latents import Encoded
from diffalign.data.row import DataError
from diffalign.data.sampler import Processes
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from tests.data.cache.test_latents import encode, needed
from tests.data.helpers import FakeEncoder, pick_rows, write_parquet


@pytest.fixture
def table(tmp_path: Path) -> PairTable:
    return open_pairs(write_parquet(tmp_path / "pairs.parquet", pick_rows(7)))


def test_killed_encoding_goes_on_where_it_stopped(table: PairTable, tmp_path: Path) -> None:
    class Killed(FakeEncoder):
        def moments(self, pixels: torch.Tensor) -> torch.Tensor:
            if self.image_calls == 3:
                raise KeyboardInterrupt
            return super().moments(pixels)

    folder = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        encode(table, folder, Killed(), batch_size=2)
    for name in (".moments-00002.safetensors.node1.999.ab", ".manifest.json.node1.999.ab"):
        (folder / name).write_bytes(b"half a file")  # what a kill -9 leaves
        os.utime(folder / name, (time.time() - 7 * 3600,) * 2)
    finished = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    assert len([name for name in finished if name.startswith("moments")]) == 2
    with pytest.raises(DataError, match=r"is incomplete: 2 of 5 shards are missing \(first: moments-0000.*continues"):
        open_cache(folder, needed(table))
    encoder = FakeEncoder()
    result = encode(table, folder, encoder, batch_size=2)
    assert (result.shards_written, result.shards_found, result.shards_missing) == (2, 3, 0)
    assert encoder.image_calls == 2
    for name, content in finished.items():
        assert (folder / name).read_bytes() == content
    encode(table, tmp_path / "whole")
    for file in (tmp_path / "whole").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name
    assert not list(folder.glob(".*"))


def test_processes_share_the_shards(table: PairTable, tmp_path: Path) -> None:
    encode(table, tmp_path / "one")
    results = [encode(table, tmp_path / "three", processes=Processes(r, 3)) for r in range(3)]
    assert [result.shards_missing for result in results] == [2, 1, 0]
    assert [result.shards_written for result in results] == [3, 1, 1]
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "three" / file.name).read_bytes() == file.read_bytes()


def test_runs_that_fill_one_folder_at_once_share_the_work(tmp_path: Path) -> None:
    """Two runs take turns at every call of the encoder; between two turns the other may write anything."""
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", pick_rows(24)))
    turns = threading.Barrier(2)

    class InTurn(FakeEncoder):
        def moments(self, pixels: torch.Tensor) -> torch.Tensor:
            with suppress(threading.BrokenBarrierError):  # the other run is done
                turns.wait(timeout=5)  # both runs are inside a shard: in the same one, now and then
            return super().moments(pixels)

    results: list[Encoded] = []

    def run() -> None:
        results.append(encode(table, tmp_path / "cache", InTurn(), batch_size=2))
        turns.abort()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert sum(result.shards_found for result in results) >= 6  # of 13; 12 with no shard encoded twice
    encode(table, tmp_path / "alone")
    assert {file.name for file in (tmp_path / "cache").iterdir()} == {f.name for f in (tmp_path / "alone").iterdir()}
    for file in (tmp_path / "alone").iterdir():
        assert (tmp_path / "cache" / file.name).read_bytes() == file.read_bytes(), file.name


def test_another_run_that_finishes_meanwhile_is_not_repeated(table: PairTable, tmp_path: Path) -> None:
    class Overtaken(FakeEncoder):
        def moments(self, pixels: torch.Tensor) -> torch.Tensor:
            if self.image_calls == 1:  # call 0 asked for the shape
                (file,) = encode(table, folder).folder.glob(".moments*")  # the whole cache, in the middle of a shard
                assert file.read_bytes() == b"being written"
            return super().moments(pixels)

    folder = tmp_path / "cache"
    folder.mkdir()
    fresh = folder / ".moments-00000.safetensors.node2.17.cd"
    fresh.write_bytes(b"being written")
    result = encode(table, folder, Overtaken(), batch_size=2)
    assert (result.shards_written, result.shards_found, result.shards_missing) == (2, 3, 0)  # the text and that shard
    assert fresh.read_bytes() == b"being written"


def test_of_two_runs_that_begin_at_once_one_decides_what_the_cache_holds(table: PairTable, tmp_path: Path) -> None:
    class Overtaken(FakeEncoder):
        def moments(self, pixels: torch.Tensor) -> torch.Tensor:
            if self.image_calls == 0:  # the plan is being made; no manifest yet
                encode(table, tmp_path / "cache")
            return super().moments(pixels)

    with pytest.raises(DataError, match=r"a different latent cache; delete it.*\n  resolution: the cache has 16"):
        encode(table, tmp_path / "cache", Overtaken(), resolution=32)
    assert not list((tmp_path / "cache").glob(".*"))
    open_cache(tmp_path / "cache", needed(table))


def test_without_hard_links_a_cache_is_begun_by_renaming(
    table: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(one: Path, two: Path) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    assert encode(table, tmp_path / "cache").shards_missing == 0
    assert not list((tmp_path / "cache").glob(".*"))
