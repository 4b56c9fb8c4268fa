"""Which pair is visited when: one seeded permutation per epoch, and who draws which position of it.

A run is a line of positions 0, 1, 2, …; position p is visited at epoch p // n. An optimiser step takes the
next `batch * accumulation * processes` positions, so resuming needs the step number alone, and the set of
pairs of a step does not depend on how many processes share it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.objectives.draws import generator, pair_key


class PairOrder:
    """Position -> (index of the pair, draw), where draw counts the earlier visits of that pair."""

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"an order needs at least one pair, got n={n}; see `diffalign data check`")
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


def positions_for(step: int, batch: int, accumulation: int, process: int, processes: int) -> Tensor:
    """Positions that one process draws at an optimiser step: int64 [accumulation batch].

    All processes together take consecutive positions, micro-batch by micro-batch.
    """
    if not 0 <= process < processes:
        raise ValueError(f"process {process} of {processes}: it counts from 0")
    line = torch.arange(batch * accumulation * processes) + step * batch * accumulation * processes
    return line.view(accumulation, processes, batch)[:, process]
