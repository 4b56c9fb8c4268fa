"""Remote parquet shards (fsspec's in-memory store): fetched when used, few at a time, in an order that is resumed."""

from __future__ import annotations

import io
import itertools
import logging
import multiprocessing
import pickle
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.registry import known_implementations

from diffalign.config.schema import Config, ConfigError, parse_config
from diffalign.data import remote_shards as remote
from diffalign.data.row import DataError
from diffalign.data.sampler import BlockOrder, PairOrder
from diffalign.data.spec import DataSpec
from diffalign.data.table.identity import data_identity
from diffalign.data.table.open import open_pairs
from diffalign.io.files import NoSpaceError
from diffalign.training.run import run_training
from tests.data.helpers import pick_rows, write_parquet
from tests.training.test_run import metrics, same, weights

UNSEEN = DataSpec(verify="none")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`memory://pairs/data/train-0000N.parquet`: five shards of six pairs, three row groups each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    found = fsspec.filesystem("memory")
    rows = pick_rows(30, prompts=30)
    for shard in range(5):
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows[6 * shard : 6 * shard + 6]), stream, row_group_size=2)
        found.pipe(f"/pairs/data/train-{shard:05d}.parquet", stream.getvalue())
    found.pipe("/pairs/README.md", b"text")
    yield found
    found.rm("/pairs", recursive=True)


def fetched(folder: Path) -> list[str]:
    return sorted(file.name[17:] for file in (folder / "home/diffalign/shards").rglob("*.parquet"))


@pytest.mark.usefixtures("store")
def test_remote_pairs_are_the_local_ones_and_shards_come_when_they_are_used(tmp_path: Path) -> None:
    local = open_pairs(write_parquet(tmp_path / "local.parquet", pick_rows(30, prompts=30)), UNSEEN)
    table = open_pairs("memory://pairs", UNSEEN)
    assert (table.ids, table.prompts, table.storage) == (local.ids, local.prompts, "5 remote parquet files")
    assert data_identity(table) == data_identity(local)
    assert fetched(tmp_path) == []  # prompts, labels and uids were read where they are
    assert table[13].chosen.read() == local[13].chosen.read()
    assert table[13].where == "train-00002.parquet row 1"
    assert fetched(tmp_path) == ["train-00002.parquet"]
    sent = pickle.loads(pickle.dumps(table))  # as to a loader worker
    assert [sent[i].rejected.read() for i in range(30)] == [local[i].rejected.read() for i in range(30)]
    assert fetched(tmp_path) == [f"train-{shard:05d}.parquet" for shard in range(5)]
    for url in ("memory://pairs/data/train-00001.parquet", "memory://pairs/data/*1.parquet"):
        assert open_pairs(url, UNSEEN).ids == local.ids[6:12]


@pytest.mark.parametrize("part", ["/", "/*.parquet", "/train-00001.parquet"])
def test_shards_of_a_web_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    for shard in range(2):
        write_parquet(
            tmp_path / f"data/train-{shard:05d}.parquet", pick_rows(12, prompts=12)[6 * shard : 6 * shard + 6]
        )
    local = open_pairs(tmp_path / "data" / part.strip("/*"), UNSEEN) if "0" in part else open_pairs(tmp_path / "data")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = open_pairs(f"http://127.0.0.1:{server.server_port}/data{part}", UNSEEN)
        assert [found[i].chosen.read() for i in range(len(found))] == [
            local[i].chosen.read() for i in range(len(local))
        ]
        assert [*found.ids] == [*local.ids]
        server.shutdown()


@pytest.mark.usefixtures("store")
def test_the_folder_has_the_shards_that_were_used_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SHARDS", 2)
    table = open_pairs("memory://pairs", UNSEEN)
    for index in (0, 7, 3, 14):
        table[index]
    assert fetched(tmp_path) == ["train-00000.parquet", "train-00002.parquet"]
    assert table[8].chosen.read()
    real, removed = remote.RemoteParquet.local, []

    def gone(self: Any, number: int) -> Path:
        file = real(self, number)
        if not removed:
            removed.append(file.unlink())  # by another process, between a look and opening it
        return file

    monkeypatch.setattr(remote.RemoteParquet, "local", gone)
    assert table[26].chosen.read()
    assert removed


def test_each_epoch_visits_every_pair_once_from_few_shards_at_a_time() -> None:
    blocks = [(shard, 3 * shard + group) for shard in range(8) for group in range(3) for _ in range(5 + group)]
    n, buffer = len(blocks), 16
    order = BlockOrder(blocks, seed=3, buffer=buffer)
    line = [order(position) for position in range(2 * n)]
    for epoch in range(2):
        assert sorted(line[epoch * n : epoch * n + n]) == [(pair, epoch) for pair in range(n)]
    assert line[:n] != sorted(line[:n])
    assert [pair for pair, _ in line[:n]] != [pair for pair, _ in line[n:]]
    for start in range(n - buffer):  # two pools at most, of four blocks each, which lie in three shards each
        assert len({blocks[pair][0] for pair, _ in line[start : start + buffer]}) <= 5
    alike = Counter(blocks[a][1] == blocks[b][1] for (a, _), (b, _) in itertools.pairwise(line[:n]))
    assert alike[False] > alike[True]  # neighbours are mostly of different blocks
    for position in (0, n - 1, n, n + 40, 7, 2 * n - 1):  # any position alone, as a resumed run asks
        assert BlockOrder(blocks, seed=3, buffer=buffer)(position) == line[position]
    assert [BlockOrder(blocks, seed=4, buffer=buffer)(p) for p in range(n)] != line[:n]
    whole = BlockOrder(blocks, seed=3, buffer=n)
    assert sorted(whole(p)[0] for p in range(n)) == sorted(PairOrder(n, 3)(p)[0] for p in range(n))


@pytest.mark.usefixtures("store")
def test_a_run_on_remote_shards_is_the_same_when_it_is_resumed_and_with_workers(make: Any, tmp_path: Path) -> None:
    settings = {"training.max_train_steps": 6, "training.checkpointing_steps": 3, "data.shuffle_buffer": 4}
    run_training(make("whole", settings))
    run_training(make("parts", {**settings, "training.max_train_steps": 3}))
    more = {"training.resume_from_checkpoint": "latest", "data.dataloader_num_workers": 2}
    run_training(make("parts", {**settings, **more}))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.fixture
def make(tmp_path: Path, tiny_sd: Path) -> Any:
    def config(name: str, overrides: dict[str, Any]) -> Config:
        tree: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "model": {"pretrained_model_name_or_path": str(tiny_sd), "gradient_checkpointing": "none"},
            "tuning": {"method": "lora", "rank": 2, "alpha": 2},
            "objective": {"name": "dpo", "beta": 500.0},
            "data": {"path": "memory://pairs", "resolution": 32, "verify": "none"},
            "training": {"train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none"},
        }
        for key, value in overrides.items():
            section, _, part = key.partition(".")
            tree.setdefault(section, {})[part] = value
        return parse_config(tree)

    return config


def fetch_all(url: str, answers: Any) -> None:
    logging.basicConfig(level=logging.INFO, handlers=[handler := logging.StreamHandler(io.StringIO())], force=True)
    table = open_pairs(url, UNSEEN)
    answers.put(([len(table[i].chosen.read()) for i in range(len(table))], handler.stream.getvalue().count("fetching")))


def test_two_processes_fetch_each_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `file://`, a store that both see."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for shard in range(3):
        write_parquet(tmp_path / f"data/{shard}.parquet", pick_rows(6))
    context: Any = multiprocessing.get_context("fork")
    answers = context.Queue()
    both = [context.Process(target=fetch_all, args=(f"file://{tmp_path}/data", answers)) for _ in range(2)]
    for process in both:
        process.start()
    found = [answers.get(timeout=60) for _ in both]
    for process in both:
        process.join()
    assert found[0][0] == found[1][0]
    assert sum(fetches for _, fetches in found) == 3
    assert not list((tmp_path / "home").rglob("*.partial"))


@pytest.mark.usefixtures("store")
def test_what_cannot_be_streamed_is_refused(store: Any, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, message in (
        ("memory://nowhere", r"has no \.parquet files"),
        ("nosuch://pairs", "nosuch"),
        ("memory://pairs/README.md", "is not a readable parquet file"),
    ):
        with pytest.raises(DataError, match=message):
            open_pairs(url, UNSEEN)
    with monkeypatch.context() as without:
        without.setitem(known_implementations, "far", {"class": "far_fs.FS", "err": "Install far_fs"})
        with pytest.raises(DataError, match=r"far://pairs: Install far_fs; `pip install` that here"):
            open_pairs("far://pairs", UNSEEN)
    with pytest.raises(DataError, match="verify='header' reads every image"):
        open_pairs("memory://pairs")
    with pytest.raises(DataError, match="ranked images of memory://pairs are not streamed"):
        open_pairs("memory://pairs", DataSpec(verify="none", columns={"images": "jpg_0", "scores": "label_0"}))
    with pytest.raises(DataError, match="no uid columns"):
        open_pairs("memory://pairs", DataSpec(verify="none", columns={"uid_0": "", "uid_1": ""}))
    for overrides, message in (
        ({"data.verify": "header"}, "would fetch every shard"),
        ({"data.curriculum": {"chunks": 2}}, "copy the data here"),
        ({"validation.pairs": 0.2}, r"data\.cache_dir"),
        ({"data.path": "pairs.parquet", "data.shuffle_buffer": 8}, "is for remote shards"),
        ({"source.name": "online_pairs", "source.scorer": "world"}, "by turns"),
    ):
        with pytest.raises(ConfigError, match=message):
            make("out", overrides)
    table = open_pairs("memory://pairs", UNSEEN)
    monkeypatch.setattr("diffalign.io.files.free_bytes", lambda _: 10)
    with pytest.raises(NoSpaceError, match=r"no space for the shard /pairs/data/train-00000\.parquet"):
        table[0].chosen.read()
    monkeypatch.undo()
