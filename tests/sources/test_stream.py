"""The stream of rounds: every pair once and in one order, for any process and after any stop."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffalign.data.sampler import Processes
from diffalign.sources.base import SourceError
from diffalign.sources.rounds import Place, Rollout, rounds_there
from diffalign.types import PairBatch
from tests.sources.toy import PROMPTS, made, toy_context, toy_source

STEP = 2  # micro-batches in a step


def values(batches: list[PairBatch]) -> list[float]:
    """What the pairs of some batches hold, in order."""
    return [float(x) for batch in batches for x in batch.latents[0, :, 0, 0, 0]]


def take(source: Any, steps: int, first: int = 0) -> list[PairBatch]:
    return list(islice(source.batches(first), steps * STEP))


def test_each_pair_is_used_once_and_what_fills_no_step_is_carried(tmp_path: Path) -> None:
    source = toy_source(toy_context(tmp_path))
    seen = values(take(source, 5))  # 20 pairs: four rounds of five, a step takes four
    assert sorted(seen) == [10.0 * place for place in range(20)]
    assert source.rolled == [0, 1, 2, 3]
    assert seen[:5] != sorted(seen[:5])  # shuffled
    said = source.take_metrics()
    assert said["rollout/carried"].tolist() == [0, 1, 2, 3]
    assert said["rollout/pairs"].tolist() == [5] * 4
    assert len(said["rollout/valid"]) == 20
    assert source.take_metrics() == {}


def test_a_round_visits_every_prompt_before_any_again(tmp_path: Path) -> None:
    source = toy_source(toy_context(tmp_path))
    rows = [place.row for number in range(7) for place in source.places(number)]
    for start in range(0, 35, len(PROMPTS)):
        assert sorted(rows[start : start + len(PROMPTS)]) == list(range(len(PROMPTS)))
    numbers = [place.number for number in range(7) for place in source.places(number)]
    assert numbers == list(range(35))
    seeds = {place.seed(0, k) for number in range(7) for place in source.places(number) for k in range(3)}
    assert len(seeds) == 105


def test_what_a_batch_holds(tmp_path: Path) -> None:
    source = toy_source(toy_context(tmp_path, with_uncond=True))
    batch = take(source, 1)[0]
    encoder, (pair,) = source.context.encoder, values([batch])[:1]
    prompt = next(p.prompt for p in source.places(0) if p.number == pair // 10)
    assert torch.equal(batch.cond.prompt_embeds[0, 0], encoder.prompts([prompt]).prompt_embeds[0])
    assert torch.equal(batch.uncond.prompt_embeds[1, 1], encoder.prompts([""]).prompt_embeds[0])
    assert batch.cond.time_ids.shape == (2, 2, 6)
    assert batch.scores[0, 0] == pair
    assert len(set(batch.keys.tolist())) == 2
    assert batch.keys.dtype == torch.int64


def test_dropped_prompts_belong_to_the_pair(tmp_path: Path) -> None:
    source = toy_source(toy_context(tmp_path, prompt_dropout=0.5))
    null = source.context.encoder.prompts([""]).prompt_embeds[0]
    dropped = [torch.equal(b.cond.prompt_embeds[0, i], null) for b in take(source, 5) for i in range(2)]
    assert 4 < sum(dropped) < 16


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_stop_in_the_middle_changes_nothing(stop: int, tmp_path: Path) -> None:
    whole = take(toy_source(toy_context(tmp_path / "a"), pairs=2), 8)
    first = toy_source(toy_context(tmp_path / "b"), pairs=2)
    before = take(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    second = toy_source(toy_context(tmp_path / "b"), pairs=2)
    second.load_state_dict(state)
    after = take(second, 8 - stop, stop)
    assert values(before + after) == values(whole)
    assert [b.keys.tolist() for b in before + after] == [b.keys.tolist() for b in whole]
    assert state["round"] not in second.rolled  # its files were read again


def test_a_state_belongs_to_its_step(tmp_path: Path) -> None:
    source = toy_source(toy_context(tmp_path))
    take(source, 2)
    with pytest.raises(SourceError, match="is at step 2, and batches from step 5"):
        next(source.batches(5))


def test_the_state_of_offline_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="without a `source` section"):
        toy_source(toy_context(tmp_path)).load_state_dict({})


def two_processes(folder: Path, steps: int, **settings: Any) -> list[list[PairBatch]]:
    """The batches of two processes, played by threads that share a folder and a barrier."""
    barrier, out = threading.Barrier(2, timeout=60), [[], []]

    def work(process: int) -> None:
        context = toy_context(
            folder, processes=Processes(process, 2), train_batch_size=1, wait=lambda: barrier.wait() and None
        )
        out[process] = take(toy_source(context, **settings), steps)

    threads = [threading.Thread(target=work, args=(process,)) for process in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return out


@pytest.mark.parametrize("settings", [{"pairs": 2}, {"steps_per_round": 3}])
def test_two_processes_see_the_pairs_of_one(settings: dict[str, Any], tmp_path: Path) -> None:
    one = take(toy_source(toy_context(tmp_path / "one"), **settings), 6)
    two = two_processes(tmp_path / "two", 6, **settings)
    assert len(two[0]) == len(two[1]) == len(one)
    for whole, left, right in zip(one, *two, strict=True):
        assert torch.equal(whole.latents, torch.cat([left.latents, right.latents], 1))
        assert torch.equal(whole.keys, torch.cat([left.keys, right.keys]))


def test_a_pool_is_visited_again_with_fresh_draws(tmp_path: Path) -> None:
    source = toy_source(toy_context(tmp_path), steps_per_round=5)
    batches = take(source, 6)
    pool = values(batches[: 5 * STEP])
    assert sorted(pool) == sorted([10.0 * place for place in range(5)] * 4)
    keys = torch.cat([b.keys for b in batches[: 5 * STEP]]).tolist()
    assert len(set(keys)) == 20
    assert source.rolled == [0, 1]


def emptied(source: Any, empty: set[int]) -> Any:
    """The source with some rounds in which no pair is valid."""
    source.roll = lambda number, places: Rollout(None if number in empty else made(places), {})
    return source


def test_a_round_without_a_valid_pair_is_skipped_and_counted(tmp_path: Path) -> None:
    source = emptied(toy_source(toy_context(tmp_path), max_empty_rounds=3), {0, 1, 3})
    seen = values(take(source, 2))
    assert {int(x) // 50 for x in seen} <= {2, 4}
    assert source.take_metrics()["rollout/empty"].tolist() == [1, 1, 0, 1, 0]
    with pytest.raises(SourceError, match="3 rounds in a row, of 5 prompts each, had no valid pair"):
        take(emptied(toy_source(toy_context(tmp_path / "b"), max_empty_rounds=3), {0, 1, 2}), 1)
    pool = toy_source(toy_context(tmp_path / "c"), max_empty_rounds=2, steps_per_round=2)
    with pytest.raises(SourceError, match="2 rounds in a row, of 5"):
        take(emptied(pool, {0, 1}), 1)


def test_old_rounds_go_unless_a_checkpoint_needs_them(tmp_path: Path) -> None:
    take(toy_source(toy_context(tmp_path / "a")), 5)
    assert rounds_there(tmp_path / "a/rounds") == [2, 3]  # round 3 began with three pairs of round 2
    states: list[dict] = []
    source = toy_source(toy_context(tmp_path / "b", saved=lambda: states), pairs=4)
    stream = source.batches()
    list(islice(stream, STEP))
    states.append(source.state_dict())
    list(islice(stream, 15 * STEP))
    assert rounds_there(tmp_path / "b/rounds") == [0, 3]
    kept = toy_source(toy_context(tmp_path / "c"), pairs=4, keep_rounds=True)
    take(kept, 16)
    assert rounds_there(tmp_path / "c/rounds") == [0, 1, 2, 3]


def test_a_round_made_elsewhere_is_used(tmp_path: Path) -> None:
    """Another process may produce the files; here one with another number of shares."""
    two_processes(tmp_path, 1)
    source = toy_source(toy_context(tmp_path))
    first = values(take(source, 1))
    assert source.rolled == []
    assert first == values(take(toy_source(toy_context(tmp_path / "own")), 1))


def test_files_of_another_run_are_refused(tmp_path: Path) -> None:
    take(toy_source(toy_context(tmp_path)), 1)
    with pytest.raises(SourceError, match="key k, and other is needed"):
        take(toy_source(toy_context(tmp_path), key="other"), 1)


def test_missing_files_are_named(tmp_path: Path) -> None:
    first = toy_source(toy_context(tmp_path), pairs=4)
    take(first, 2)
    for file in (tmp_path / "rounds/round-00000").iterdir():
        file.unlink()
    second = toy_source(toy_context(tmp_path), pairs=4)
    second.load_state_dict(first.state_dict())
    with pytest.raises(SourceError, match="the files of round 0 are not in"):
        next(second.batches(2))


def test_the_order_belongs_to_the_run(tmp_path: Path) -> None:
    seeds = [values(take(toy_source(toy_context(tmp_path / str(s), run_seed=s)), 2)) for s in (0, 1)]
    assert seeds[0] != seeds[1]


def test_place_is_a_value() -> None:
    place = Place(4, 0, "id", "text")
    assert place.seed(0, 1) == replace(place, prompt="other").seed(0, 1)
    assert 0 <= place.seed(0, 1) < 2**32


def test_a_round_that_is_found_counts_and_says_what_making_it_did(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A round of a killed run is logged and counted as if it were made now. A damaged one is made again."""

    def source() -> Any:
        networks = SimpleNamespace(image_forwards=0, gathered=nullcontext)
        made_here: Any = toy_source(toy_context(tmp_path, networks=networks))
        roll = made_here.roll

        def costly(number: int, places: list[Place]) -> Rollout:
            networks.image_forwards += 10 * len(places)
            values = torch.rand(len(places), generator=torch.Generator().manual_seed(number))
            return Rollout(roll(number, places).records, {"rollout/score": values})

        made_here.roll = costly
        return made_here

    whole, again = source(), source()
    take(whole, 2)
    assert whole.context.networks.image_forwards == 100
    take(again, 2)
    assert again.rolled == []
    assert again.context.networks.image_forwards == 100
    one, two = whole.take_metrics(), again.take_metrics()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    (file,) = (tmp_path / "rounds/round-00001").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    inside = source()
    state = whole.state_dict()
    inside.load_state_dict(state | {"used": 1} if state["used"] == 0 else state)
    with pytest.raises(SourceError, match=r"round 1 is damaged, .*share-.*content.*; *|from a copy, or resume"):
        take(inside, 1, 2)
    third = source()
    take(third, 2)
    assert third.rolled == [1]
    assert "round 1 is damaged and is made again" in caplog.text
    assert third.context.networks.image_forwards == 100
