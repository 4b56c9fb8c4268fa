"""The order of the visits: one seeded permutation per epoch, and the positions of it that each process takes.

A run is a line of positions 0, 1, 2, …; position p is visited at epoch p // n. An optimiser step takes the
next `batch * accumulation * processes` positions, so resuming needs the step number alone, and the set of
pairs of a step does not depend on how many processes share it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from diffalign.engine.random import generator, pair_key
from diffalign.errors import DiffalignError

T = TypeVar("T")
Order = Callable[[int], tuple[int, int]]  # position -> (index of the pair, draw); no two visits of a pair share a draw


@dataclass(frozen=True)
class Processes:
    """This process among those of a launch; `share` divides work among them."""

    process_index: int = 0
    num_processes: int = 1

    def share(self, names: list[T]) -> list[T]:
        """This process's part of what all of them do together: every `num_processes`-th."""
        return names[self.process_index :: self.num_processes]


ALONE = Processes()


class PairOrder:
    """Position -> (index of the pair, draw), where draw counts the earlier visits of that pair."""

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise DiffalignError(f"an order needs at least one pair, got n={n}; see `diffalign data check`")
        self.n, self.seed = n, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, position: int) -> tuple[int, int]:
        """The pair at `position` and how many times it was visited before."""
        epoch, place = divmod(position, self.n)
        if epoch != self._epoch:
            key = pair_key(self.seed, "order", epoch)
            self._permutation = torch.randperm(self.n, generator=generator(key, "order"))
            self._epoch = epoch
        return int(self._permutation[place]), epoch


class BlockOrder:
    """As `PairOrder`, with the pairs of a few blocks of the storage at a time, for data that are fetched when used.

    An epoch permutes the shards, and the blocks in each; so many blocks in a row as have `buffer` pairs or more are one
    pool, which is visited in a permutation. Each pair is visited once in an epoch, and the position alone tells which.
    """

    def __init__(self, blocks: Sequence[tuple[int, int]], seed: int, buffer: int) -> None:
        """blocks: shard and block of each pair, the pairs of a block in a row. buffer: pairs that are mixed."""
        self.n, self.seed, self.buffer = len(blocks), seed, buffer
        starts = [i for i in range(self.n) if i == 0 or blocks[i] != blocks[i - 1]]
        self._blocks = [(blocks[a][0], a, b) for a, b in zip(starts, [*starts[1:], self.n])]
        self._epoch, self._ends = -1, list[int]()  # and where each of its pools ends
        self._pools: list[list[int]] = []  # the blocks of each
        self._drawn: tuple[int, list[int]] = (-1, [])  # a pool and its pairs in order

    def __call__(self, position: int) -> tuple[int, int]:
        """The pair at `position` and how many times it was visited before."""
        epoch, place = divmod(position, self.n)
        if epoch != self._epoch:
            self._begin(epoch)
        pool = bisect_right(self._ends, place)
        if pool != self._drawn[0]:
            self._drawn = pool, self._mixed(pool)
        return self._drawn[1][place - (self._ends[pool - 1] if pool else 0)], epoch

    def _begin(self, epoch: int) -> None:
        key = pair_key(self.seed, "order", epoch)
        shards = sorted({shard for shard, _, _ in self._blocks})
        turns = torch.randperm(len(shards), generator=generator(key, "shards")).tolist()
        turn = dict(zip(shards, turns))
        line = torch.randperm(len(self._blocks), generator=generator(key, "blocks")).tolist()
        line.sort(key=lambda block: turn[self._blocks[block][0]])  # stable: shard by shard
        self._epoch, self._drawn = epoch, (-1, [])
        self._pools, self._ends = [], []
        pool, size = list[int](), 0
        for place, block in enumerate(line):
            _, start, end = self._blocks[block]
            pool, size = [*pool, block], size + end - start
            if size >= self.buffer or place == len(line) - 1:
                self._pools.append(pool)
                self._ends.append(size + (self._ends[-1] if self._ends else 0))
                pool, size = [], 0

    def _mixed(self, pool: int) -> list[int]:
        pairs = [i for block in self._pools[pool] for i in range(*self._blocks[block][1:])]
        key = pair_key(self.seed, "order", self._epoch)
        return [pairs[i] for i in torch.randperm(len(pairs), generator=generator(key, f"pool {pool}")).tolist()]


class CurriculumOrder:
    """Easy pairs first: the pool grows by a chunk K times in the course of a run, and has every pair after it.

    Curriculum-DPO (arXiv 2405.13637): pairs in the order of their score gaps, largest first, are cut into K chunks, and
    stage k of K trains on the union of the first k. A stage lasts positions / K positions and visits its pool in seeded
    permutations, begun anew with the stage. The draw counts the permutations begun so far; with one chunk this is
    `PairOrder` itself.

    Differs from the paper: chunks of equal numbers of pairs rather than equal intervals of difficulty, so that no chunk
    is empty, and difficulty is the gap of scores rather than of ranks among a prompt's many samples.
    """

    def __init__(self, gaps: Sequence[float], seed: int, chunks: int, positions: int) -> None:
        """`gaps` are chosen - rejected of every pair (nan, where there is no score, comes last); `positions` the length
        of the curriculum in visits. Raises DiffalignError for more chunks than pairs, or gaps that are all equal.
        """
        n = len(gaps)
        if not 1 <= chunks <= n:
            raise DiffalignError(f"data.curriculum.chunks = {chunks} for {n} pairs; allowed are 1 to {n}")
        known = [gap for gap in gaps if not math.isnan(gap)]
        if chunks > 1 and len(set(known)) < 2:
            raise DiffalignError(
                f"data.curriculum: the scores give all {n} pairs the same gap, so none is easier; remove "
                "data.curriculum"
            )
        easiest = sorted(range(n), key=lambda i: (math.isnan(gaps[i]), -gaps[i] if gaps[i] == gaps[i] else 0.0, i))
        self.seed, self.chunks, self.positions = seed, chunks, positions
        # in stored order within a pool, so that the last pool is the table
        self.pools = [sorted(easiest[: -(-n * (k + 1) // chunks)]) for k in range(chunks)]
        self.starts = [-(-k * positions // chunks) for k in range(chunks)]
        ends = [*self.starts[1:], self.starts[-1]]
        self._begun = [0]  # permutations begun before each stage
        for start, end, pool in zip(self.starts, ends, self.pools, strict=True):
            self._begun.append(self._begun[-1] - (start - end) // len(pool))
        self._drawn = (-1, torch.empty(0, dtype=torch.int64))

    def __call__(self, position: int) -> tuple[int, int]:
        """The pair at `position`, and how many permutations were begun before the one it is in."""
        stage = min(self.chunks - 1, position * self.chunks // self.positions)
        pool = self.pools[stage]
        passed, place = divmod(position - self.starts[stage], len(pool))
        draw = self._begun[stage] + passed
        if draw != self._drawn[0]:
            key = pair_key(self.seed, "order", draw)
            self._drawn = draw, torch.randperm(len(pool), generator=generator(key, "order"))
        return pool[int(self._drawn[1][place])], draw


def positions_for(step: int, batch: int, accumulation: int, processes: Processes = ALONE) -> Tensor:
    """Positions that this process draws at an optimiser step: int64 [accumulation batch].

    All processes together take consecutive positions, micro-batch by micro-batch.
    """
    process, count = processes.process_index, processes.num_processes
    if not 0 <= process < count:
        raise DiffalignError(f"process {process} of {count}: processes are counted from 0")
    line = torch.arange(batch * accumulation * count) + step * batch * accumulation * count
    return line.view(accumulation, count, batch)[:, process]
