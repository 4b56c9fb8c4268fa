"""The order of pairs: permutations, resuming, and independence of the number of processes."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.data.sampler import CurriculumOrder, PairOrder, Processes, positions_for


@pytest.mark.parametrize("n", [1, 2, 7, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_epoch_visits_every_pair_once(n: int, seed: int) -> None:
    order = PairOrder(n, seed)
    for epoch in range(3):
        visits = [order(epoch * n + i) for i in range(n)]
        assert sorted(index for index, _ in visits) == list(range(n))
        assert {draw for _, draw in visits} == {epoch}


def test_a_position_means_the_same_from_anywhere() -> None:
    forward, fresh = PairOrder(13, 5), PairOrder(13, 5)
    line = [forward(position) for position in range(60)]
    places = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    assert [fresh(position) for position in places] == [line[position] for position in places]


def test_epochs_and_seeds_differ() -> None:
    order, other = PairOrder(50, 0), PairOrder(50, 1)
    epochs = [[order(epoch * 50 + i)[0] for i in range(50)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != [other(i)[0] for i in range(50)]
    assert epochs[0] != list(range(50))


def test_neighbours_are_not_kept_together() -> None:
    """Mean distance of consecutive indices of a random order of n is about n / 3."""
    order = PairOrder(1000, 3)
    line = torch.tensor([order(i)[0] for i in range(1000)])
    assert 300 < (line[1:] - line[:-1]).abs().double().mean() < 367


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_a_step_takes_the_same_positions_for_any_split(batch: int, accumulation: int, processes: int) -> None:
    """Global batch 8 * 4; each split of it over processes and micro-batches covers the same window."""
    batch_here = batch * 4 // processes
    for step in (0, 1, 17):
        shares = [positions_for(step, batch_here, accumulation, Processes(p, processes)) for p in range(processes)]
        assert all(share.shape == (accumulation, batch_here) for share in shares)
        together = torch.cat([share.flatten() for share in shares]).sort().values
        assert together.tolist() == list(range(step * 32, (step + 1) * 32))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one pair, got n=0"):
        PairOrder(0, 0)
    with pytest.raises(ValueError, match="process 2 of 2"):
        positions_for(0, 1, 1, Processes(2, 2))


def gaps(n: int) -> list[float]:
    """Distinct gaps in a mixed order."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(1)).double().sub(n // 3).tolist()


@pytest.mark.parametrize(("n", "chunks", "positions"), [(10, 2, 100), (23, 4, 997), (7, 7, 300)])
def test_the_pool_grows_from_the_easiest_pairs_to_all(n: int, chunks: int, positions: int) -> None:
    scores = gaps(n)
    easiest = sorted(range(n), key=lambda i: -scores[i])
    order = CurriculumOrder(scores, 0, chunks, positions)
    for k in range(chunks):
        stage = range(math.ceil(k * positions / chunks), math.ceil((k + 1) * positions / chunks))
        pool = set(easiest[: math.ceil(n * (k + 1) / chunks)])
        visits = [order(position) for position in stage]
        assert {index for index, _ in visits} == pool  # all of it, and nothing harder
        for draw in {draw for _, draw in visits}:
            some = [index for index, d in visits if d == draw]
            assert len(set(some)) == len(some)  # a permutation, or the beginning of one
            assert len(some) == len(pool) or draw == visits[-1][1]
    beyond = [order(positions + i)[0] for i in range(5 * n)]
    assert set(beyond) == set(range(n))


def test_no_two_visits_of_a_pair_share_a_draw() -> None:
    order = CurriculumOrder(gaps(23), 0, 5, 501)
    visits = [order(position) for position in range(900)]
    assert len(set(visits)) == 900
    draws = [draw for _, draw in visits]
    assert draws == sorted(draws)


def test_a_curriculum_is_a_function_of_seed_and_position_alone() -> None:
    forward, fresh = (CurriculumOrder(gaps(13), 5, 3, 60) for _ in range(2))
    line = [forward(position) for position in range(90)]
    places = torch.randperm(90, generator=torch.Generator().manual_seed(0)).tolist()
    assert [fresh(position) for position in places] == [line[position] for position in places]
    other = CurriculumOrder(gaps(13), 6, 3, 60)
    assert [other(position) for position in range(90)] != line


def test_one_chunk_is_the_plain_order() -> None:
    plain, one = PairOrder(13, 5), CurriculumOrder(gaps(13), 5, 1, 60)
    assert [one(position) for position in range(90)] == [plain(position) for position in range(90)]


def test_a_pair_without_scores_comes_last() -> None:
    order = CurriculumOrder([math.nan, 1.0, -5.0, 2.0], 0, 4, 40)
    assert [set(pool) for pool in order.pools] == [{3}, {1, 3}, {1, 2, 3}, {0, 1, 2, 3}]


def test_a_curriculum_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"chunks = 5 for 4 pairs; allowed are 1 to 4"):
        CurriculumOrder(gaps(4), 0, 5, 10)
    with pytest.raises(ValueError, match="all 4 pairs the same gap"):
        CurriculumOrder([1.0, 1.0, 1.0, math.nan], 0, 2, 10)
