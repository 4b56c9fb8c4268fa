"""Order: permutations, resume, and independence of the number of processes."""

from __future__ import annotations

import pytest
import torch

from diffalign.data.sampler import PairOrder, positions_for


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
        shares = [positions_for(step, batch_here, accumulation, p, processes) for p in range(processes)]
        assert all(share.shape == (accumulation, batch_here) for share in shares)
        together = torch.cat([share.flatten() for share in shares]).sort().values
        assert together.tolist() == list(range(step * 32, (step + 1) * 32))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one pair, got n=0"):
        PairOrder(0, 0)
    with pytest.raises(ValueError, match="process 2 of 2"):
        positions_for(0, 1, 1, 2, 2)
