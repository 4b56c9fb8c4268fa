"""Micro-batches: their content, which depends on seed, pair and visit alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.data.loader import text as source
from diffalign.data.loader.dataset import substitute
from diffalign.data.loader.loaded import sample_latents
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.row import DataError
from diffalign.data.sampler import PairOrder, Processes
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.data.transforms import prepare_pair
from diffalign.engine.random import normal, pair_key
from diffalign.types import Conditioning, PairBatch
from tests.data.helpers import FakeEncoder, pick_rows, png, write_parquet


@pytest.fixture
def table(tmp_path: Path) -> PairTable:
    return open_pairs(write_parquet(tmp_path / "pairs.parquet", pick_rows(7)))


def pairs(table: PairTable, encoder: FakeEncoder | None = None, **options: Any) -> OfflinePairs:
    settings: dict[str, Any] = {"run_seed": 3, "train_batch_size": 2} | options
    return OfflinePairs(
        table, Online(encoder or FakeEncoder(), 16, center_crop=False, random_flip=True), LoaderSpec(**settings)
    )


def take(batches: Iterator[PairBatch], count: int) -> list[PairBatch]:
    return list(islice(batches, count))


def tensors(batch: PairBatch) -> dict[str, Tensor]:
    """All tensors of a batch with the pair axis first, by name."""
    found = {"latents": batch.latents.transpose(0, 1), "keys": batch.keys}
    for name in ("cond", "uncond"):
        record: Conditioning | None = getattr(batch, name)
        for part in ("prompt_embeds", "pooled", "time_ids"):
            value = getattr(record, part, None)
            if value is not None:
                found[f"{name}.{part}"] = value.transpose(0, 1)
    if batch.scores is not None:
        found["scores"] = batch.scores.transpose(0, 1)
    return found


def joined(batches: list[PairBatch]) -> dict[str, Tensor]:
    parts = [tensors(batch) for batch in batches]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_a_batch_holds_what_its_pairs_say(table: PairTable) -> None:
    encoder = FakeEncoder()
    batch = take(pairs(table, encoder).batches(), 1)[0]
    order = PairOrder(7, 3)
    for place in range(2):
        index, draw = order(place)
        row = table[index]
        key = pair_key(3, row.id, draw)
        pixels, geometry = prepare_pair(row, (16, 16), key=key, center_crop=False, random_flip=True)
        mean, std = encoder.moments(pixels).chunk(2, dim=1)
        noise = normal(torch.tensor([key]), "vae", mean.shape)[0]
        assert batch.ids[place] == row.id
        assert int(batch.keys[place]) == key
        torch.testing.assert_close(batch.latents[:, place], mean + std * noise, rtol=0, atol=0)
        torch.testing.assert_close(batch.cond.time_ids[:, place], geometry.float())  # type: ignore[index]
        for side in range(2):
            expected = encoder.prompts([row.prompt])
            assert torch.equal(batch.cond.prompt_embeds[side, place], expected.prompt_embeds[0])
            assert torch.equal(batch.cond.pooled[side, place], expected.pooled[0])  # type: ignore[index]
    assert batch.latents.dtype == torch.float32
    assert batch.cond.prompt_embeds.stride(0) == 0  # one prompt, two sides: a view
    assert batch.uncond is None
    assert batch.scores is None


def test_each_side_keeps_its_own_size_and_crop(tmp_path: Path) -> None:
    rows = [row | {"jpg_1": png(2 * i + 1, (16, 40))} for i, row in enumerate(pick_rows(4))]
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))
    batch = take(pairs(table, train_batch_size=4).batches(), 1)[0]
    for place, name in enumerate(batch.ids):
        first_is_chosen = int(name[1]) % 2  # label_0 = i % 2
        heights = batch.cond.time_ids[:, place, 0].tolist()  # type: ignore[index]
        assert heights == ([16, 40] if first_is_chosen else [40, 16])


@pytest.mark.parametrize("options", [{}, {"prompt_dropout": 0.4, "with_uncond": True}])
def test_a_batch_of_four_is_four_batches_of_one(table: PairTable, options: dict[str, Any]) -> None:
    four = take(pairs(table, train_batch_size=4, **options).batches(), 5)
    ones = take(pairs(table, train_batch_size=1, **options).batches(), 20)
    assert_same(joined(four), joined(ones))
    assert [name for batch in four for name in batch.ids] == [name for batch in ones for name in batch.ids]


def test_accumulation_and_processes_share_the_same_step(table: PairTable) -> None:
    whole = joined(take(pairs(table, train_batch_size=4).batches(2), 1))
    order = whole["keys"].sort().indices
    for processes, accumulation, batch in ((2, 1, 2), (1, 2, 2), (2, 2, 1), (4, 1, 1)):
        parts = [
            joined(
                take(
                    pairs(
                        table,
                        train_batch_size=batch,
                        gradient_accumulation_steps=accumulation,
                        processes=Processes(process, processes),
                    ).batches(2),
                    accumulation,
                )
            )
            for process in range(processes)
        ]
        union = {name: torch.cat([part[name] for part in parts]) for name in whole}
        by_key = union["keys"].sort().indices
        assert_same({k: v[by_key] for k, v in union.items()}, {k: v[order] for k, v in whole.items()})


def test_resuming_is_exact_and_loader_workers_change_nothing(table: PairTable) -> None:
    line = take(pairs(table, gradient_accumulation_steps=2).batches(0), 12)
    resumed = take(pairs(table, gradient_accumulation_steps=2).batches(4), 4)
    assert_same(joined(line[8:]), joined(resumed))
    worked = take(pairs(table, gradient_accumulation_steps=2, num_workers=2).batches(0), 12)
    assert_same(joined(line), joined(worked))


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_pinned_memory_changes_nothing(table: PairTable, num_workers: int) -> None:
    plain = take(pairs(table).batches(), 3)
    pinned = take(pairs(table, pin_memory=True, num_workers=num_workers).batches(), 3)
    assert pinned[0].keys.is_pinned()
    assert_same(joined(plain), joined(pinned))


@pytest.mark.gpu
def test_latents_are_drawn_without_waiting_for_the_device() -> None:
    moments = torch.rand(2, 2, 8, 4, 4)
    keys = torch.tensor([5, 9])
    placed = moments.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        latents = sample_latents(placed, keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(latents.cpu(), sample_latents(moments, keys))


def test_global_random_states_are_neither_used_nor_moved(table: PairTable) -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    torch.manual_seed(1)
    before = states()
    first = joined(take(pairs(table).batches(), 3))
    assert states() == before
    torch.manual_seed(2)
    assert_same(first, joined(take(pairs(table).batches(), 3)))


def test_visits_of_a_pair_differ_and_seeds_differ(table: PairTable) -> None:
    line = joined(take(pairs(table, train_batch_size=7).batches(), 2))
    assert len(set(line["keys"].tolist())) == 14
    other = joined(take(pairs(table, train_batch_size=7, run_seed=4).batches(), 1))
    assert not set(line["keys"].tolist()) & set(other["keys"].tolist())


def test_prompt_dropout_gives_the_null_prompt_to_both_sides(table: PairTable) -> None:
    encoder = FakeEncoder()
    null = encoder.prompts([""])
    everything = take(pairs(table, prompt_dropout=1.0).batches(), 2)
    for batch in everything:
        assert torch.equal(batch.cond.prompt_embeds, null.prompt_embeds.expand(2, 2, -1, -1))
        assert torch.equal(batch.cond.pooled, null.pooled.expand(2, 2, -1))  # type: ignore[arg-type]
    some = joined(take(pairs(table, train_batch_size=50, prompt_dropout=0.2).batches(), 8))
    dropped = (some["cond.prompt_embeds"] == null.prompt_embeds[0]).flatten(1).all(1).double().mean()
    assert 0.12 < float(dropped) < 0.28  # 4 standard deviations at 400 visits
    kept = joined(take(pairs(table, train_batch_size=50).batches(), 8))
    assert torch.equal(some["latents"], kept["latents"])  # dropout draws from its own stream


def test_uncond_is_the_null_prompt_with_the_same_geometry(table: PairTable) -> None:
    batch = take(pairs(table, with_uncond=True).batches(), 1)[0]
    null = FakeEncoder().prompts([""])
    assert batch.uncond is not None
    assert torch.equal(batch.uncond.prompt_embeds, null.prompt_embeds.expand(2, 2, -1, -1))
    assert torch.equal(batch.uncond.time_ids, batch.cond.time_ids)  # type: ignore[arg-type]


def test_families_without_pooled_text_or_time_ids(table: PairTable) -> None:
    batch = take(pairs(table, FakeEncoder(pooled=False, times=False), with_uncond=True).batches(), 1)[0]
    assert batch.cond.pooled is None
    assert batch.cond.time_ids is None
    assert batch.uncond is not None
    assert batch.uncond.pooled is None


def test_scores_come_along(tmp_path: Path) -> None:
    rows = [row | {"score_0": 1.0 + i, "score_1": -1.0 - i} for i, row in enumerate(pick_rows(4))]
    scored = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))
    batch = take(pairs(scored, train_batch_size=4).batches(), 1)[0]
    assert batch.scores is not None
    by_id = {name: batch.scores[:, i].tolist() for i, name in enumerate(batch.ids)}
    assert by_id["a0:b0"] == [-1.0, 1.0]  # label_1 = 1
    assert by_id["a1:b1"] == [2.0, -2.0]


def test_each_prompt_is_encoded_once(table: PairTable) -> None:
    encoder = FakeEncoder()
    take(pairs(table, encoder).batches(), 12)
    assert sorted(encoder.prompts_seen) == ["prompt 0", "prompt 1", "prompt 2"]
    assert encoder.image_calls == 12


def test_the_text_memo_forgets_the_oldest_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "TEXT_MEMO", 2)
    encoder = FakeEncoder()
    memo = source.TextMemo(encoder)
    for prompts in (("a", "b"), ("a",), ("c",), ("a",), ("b", "b")):
        embeds, _ = memo(prompts)
        assert torch.equal(embeds, encoder.__class__().prompts(list(prompts)).prompt_embeds)
    assert encoder.prompts_seen == ["a", "b", "c", "b"]


@pytest.fixture
def broken(tmp_path: Path) -> PairTable:
    """A pair whose data end early, which the header does not show."""
    rows = pick_rows(40)
    rows[5]["jpg_0"] = png(10, (64, 64))[:6000]
    return open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))


def test_an_unreadable_pair_is_replaced_by_its_own_substitute_and_named(
    broken: PairTable, caplog: pytest.LogCaptureFixture
) -> None:
    order, stand_in = PairOrder(40, 3), broken.ids[substitute("a5:b5", 0, 40)]
    source_pairs = pairs(broken, train_batch_size=1)
    line = take(source_pairs.batches(), 80)
    for epoch in range(2):
        position = next(p for p in range(epoch * 40, epoch * 40 + 40) if order(p)[0] == 5)
        assert line[position].ids == (stand_in,)
        assert int(line[position].keys[0]) == pair_key(3, stand_in, epoch)
    assert [(p.where, p.kind) for p in source_pairs.problems] == [("pairs.parquet row 5", "corrupt image")]
    assert caplog.text.count("replaced by another pair, each time: pairs.parquet row 5: corrupt image") == 1
    assert "a5:b5" not in {name for batch in line for name in batch.ids}
    for options in ({"num_workers": 2}, {"train_batch_size": 4}):
        again = take(pairs(broken, **({"train_batch_size": 1} | options)).batches(0), 10)
        plain = take(pairs(broken, train_batch_size=again[0].pairs).batches(0), 10)
        assert_same(joined(again), joined(plain))


def test_too_many_unreadable_pairs_stop_the_run(tmp_path: Path) -> None:
    rows = pick_rows(8)
    for i in (1, 3, 6):
        rows[i]["jpg_1"] = png(10, (64, 64))[:6000]
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))
    with pytest.raises(DataError, match=r"[23] of 8 pairs could not be read; a run tolerates at most 1"):
        take(pairs(table).batches(), 8)
    take(pairs(table, max_unreadable=0.5).batches(), 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_all_unreadable_is_one_clear_error(tmp_path: Path, workers: int) -> None:
    rows = pick_rows(3)
    for row in rows:
        row["jpg_1"] = None
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows), DataSpec(verify="none"))
    assert len(table) == 3
    wanted = r"^pairs.parquet row \d cannot be read and neither can 15 .*last: .* is empty.*lists all unreadable ones$"
    with pytest.raises(DataError, match=wanted):
        take(pairs(table, num_workers=workers).batches(), 1)


def test_no_usable_pair_stops_before_anything_else(tmp_path: Path) -> None:
    rows = pick_rows(1)
    rows[0]["caption"] = ""
    table = open_pairs(write_parquet(tmp_path / "pairs.parquet", rows))
    with pytest.raises(DataError, match=r"none of the 1 rows is usable.*row 0: empty prompt"):
        pairs(table)
