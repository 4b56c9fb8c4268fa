"""Cached trajectories: computed once, found by later runs, and read as the transitions of a visit."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffalign.data.cache.latents import PairCache, open_cache
from diffalign.data.cache.trajectories import Trajectories
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.precompute.recording import Work
from diffalign.data.precompute.trajectories import record_trajectories, trajectory_key
from diffalign.data.sampler import Processes
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.io.files import NoSpaceError
from diffalign.objectives.inversion_dpo import InversionDPO
from diffalign.types import PairBatch
from tests.data.cache.test_latents import RANDOM, encode, needed
from tests.data.helpers import FakeEncoder, pick_rows, write_parquet

LEVELS = torch.tensor([-1, 249, 499, 749, 999])
SHARD = 9000  # bytes: a trajectory of five levels in two variants takes 3,840, so two pairs a shard


class Inverter:
    """Level k is the clean image plus k times the mean of its prompt's embedding; counts the pairs it was asked for."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.pairs, self.stop_after = 0, stop_after

    def __call__(self, batch: PairBatch) -> Tensor:
        if self.stop_after is not None and self.pairs >= self.stop_after:
            raise KeyboardInterrupt
        self.pairs += batch.pairs
        assert batch.uncond is not None
        assert batch.uncond.prompt_embeds.shape == batch.cond.prompt_embeds.shape
        told = batch.cond.prompt_embeds.mean((2, 3))[:, :, None, None, None, None]
        return batch.latents[:, :, None] + told * torch.arange(5).view(5, 1, 1, 1)


@pytest.fixture
def table(tmp_path: Path) -> PairTable:
    return open_pairs(write_parquet(tmp_path / "pairs.parquet", pick_rows(7)))


@pytest.fixture
def cache(table: PairTable, tmp_path: Path) -> PairCache:
    encode(table, tmp_path / "cache", **RANDOM, variants=2)
    return open_cache(tmp_path / "cache", needed(table, **RANDOM))


def source(table: PairTable, content: PairCache | Trajectories, seed: int = 3, **options: int) -> OfflinePairs:
    spec = LoaderSpec(seed, 2, with_uncond=True, **options)
    return OfflinePairs(table, content, spec, time_ids=FakeEncoder().time_ids)


def made(
    table: PairTable, cache: PairCache, inverter: Inverter, network: str = "a", process: int = 0, processes: int = 1
) -> tuple[Path, int]:
    key = trajectory_key(cache, {"network": network, "recording": {"steps": 4}})
    work = Work(shard_bytes=SHARD, processes=Processes(process, processes))
    return record_trajectories(source(table, cache), key, inverter, 5, work)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("points", [None, 2])
def test_a_visit_gets_the_transitions_it_asks_for(
    table: PairTable, cache: PairCache, points: int | None, workers: int
) -> None:
    objective = InversionDPO(steps=4, points_per_step=points)
    folder, per_shard = made(table, cache, Inverter())
    assert per_shard == 2
    kept = Trajectories(cache, folder, per_shard, LEVELS, objective.visited)
    plain = list(islice(source(table, cache).batches(), 7))
    batches = list(islice(source(table, kept, num_workers=workers).batches(), 7))  # two epochs: both variants
    for batch, without in zip(batches, plain, strict=True):
        assert batch.ids == without.ids
        assert without.transitions is None
        torch.testing.assert_close(batch.cond.prompt_embeds, without.cond.prompt_embeds)
        moves = batch.transitions
        k = objective.visited(batch.keys)
        assert torch.equal(moves.t, LEVELS[k + 1])
        assert torch.equal(moves.t_prev, LEVELS[k])
        told = batch.cond.prompt_embeds.mean((2, 3))[:, :, None, None, None, None]
        height = k[None, :, :, None, None, None]
        torch.testing.assert_close(moves.clean, batch.latents[:, :, None] + told * height)
        torch.testing.assert_close(moves.noisy, batch.latents[:, :, None] + told * (height + 1))


def test_runs_of_any_seed_share_them(table: PairTable, cache: PairCache) -> None:
    first, again = Inverter(), Inverter()
    folder, per_shard = made(table, cache, first)
    assert first.pairs == 2 * 7
    assert made(table, cache, again) == (folder, per_shard)
    assert again.pairs == 0
    by_id: dict[str, set[bytes]] = {}
    for seed in (3, 4):
        kept = Trajectories(cache, folder, per_shard, LEVELS, InversionDPO(steps=4).visited)
        for batch in islice(source(table, kept, seed).batches(), 14):  # four epochs: each variant twice
            for i, name in enumerate(batch.ids):
                by_id.setdefault(name, set()).add(batch.latents[:, i].numpy().tobytes())
    assert {len(latents) for latents in by_id.values()} == {2}


def test_another_network_has_its_own(table: PairTable, cache: PairCache) -> None:
    folder, _ = made(table, cache, Inverter(), "a")
    other = Inverter()
    assert made(table, cache, other, "b")[0] != folder
    assert other.pairs == 14
    key = json.loads((folder / "manifest.json").read_text())["key"]
    assert key["network"] == "a"
    assert key["encoded"]["dataset"] == table.identity


def test_killed_recording_goes_on_where_it_stopped(table: PairTable, cache: PairCache, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        made(table, cache, Inverter(stop_after=9))
    rest = Inverter()
    folder, _ = made(table, cache, rest)
    assert 0 < rest.pairs < 14
    finished = {file.name: file.read_bytes() for file in folder.iterdir()}
    shutil.rmtree(folder)
    made(table, cache, Inverter())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == finished
    assert len(finished) == 5


def test_processes_share_the_work(table: PairTable, cache: PairCache) -> None:
    parts = [Inverter() for _ in range(3)]
    for process, inverter in enumerate(parts):
        folder, _ = made(table, cache, inverter, process=process, processes=3)
    assert [inverter.pairs for inverter in parts] == [6, 4, 4]
    assert len(list(folder.glob("trajectory-*.safetensors"))) == 4


def test_an_unreadable_pair_is_left_out_and_substituted(tmp_path: Path) -> None:
    rows = pick_rows(7)
    rows[2]["jpg_1"] = rows[2]["jpg_1"][:60]
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows), DataSpec(verify="none"))
    encode(table, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache", needed(table))
    inverter = Inverter()
    folder, per_shard = made(table, cache, inverter)
    assert inverter.pairs == 6
    kept = Trajectories(cache, folder, per_shard, LEVELS, InversionDPO(steps=4).visited)
    pairs = source(table, kept)
    for batch in islice(pairs.batches(), 4):
        assert table.ids[2] not in batch.ids
    assert len(pairs.problems) == 1


def test_a_full_disk_is_said_before_anything_is_inverted(
    table: PairTable, cache: PairCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**30, 2**30 - 100, 100))
    inverter = Inverter()
    with pytest.raises(
        NoSpaceError, match=r"no space for trajectories at .*: about .* needed.*cache_trajectories=false"
    ):
        made(table, cache, inverter)
    assert inverter.pairs == 0
