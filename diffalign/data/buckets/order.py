"""The order of the visits where pairs have several shapes: aligned runs of positions are of one bucket."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.engine.random import generator, pair_key


class BucketOrder:
    """Position -> (index of the pair, draw), with `size` positions from each multiple of it in one bucket.

    Each bucket is visited in permutations of its own, one after the other, and cut into groups of `size`. An epoch has
    of each bucket as many whole groups as have become due, in a seeded order; the rest of a bucket is due in the next.
    So no pair is left out, no position is filled up, and a bucket's share of the visits is its share of the pairs. Of
    a bucket with fewer pairs than `size`, a group has some of them twice, at different draws.

    The order depends on the seed, the buckets and `size`, and not on the number of processes.
    """

    def __init__(self, groups: Sequence[Sequence[int]], seed: int, size: int) -> None:
        """groups: the pairs of each bucket. size: pairs in a micro-batch."""
        self.groups, self.seed, self.size = groups, seed, size
        self.n = sum(map(len, groups))
        self._epoch: tuple[int, list[tuple[int, int]]] = (-1, [])  # and its groups: bucket, and which of that bucket's
        self._drawn: dict[int, tuple[int, Tensor]] = {}  # by bucket: a permutation and its number

    def __call__(self, position: int) -> tuple[int, int]:
        """The pair at `position` and how many times it was visited before."""
        number, place = divmod(position, self.size)
        epoch = self._epoch_of(number)
        if epoch != self._epoch[0]:
            self._epoch = epoch, self._groups_of(epoch)
        bucket, which = self._epoch[1][number - self._due(epoch)]
        return self._visit(bucket, which * self.size + place)

    def _due(self, epoch: int) -> int:
        """The groups of all buckets that lie before an epoch."""
        return sum(epoch * len(group) // self.size for group in self.groups)

    def _epoch_of(self, number: int) -> int:
        """The epoch of a group: the last one before which there are at most `number` groups."""
        epoch = number * self.size // self.n  # at most so many visits are due before it
        while self._due(epoch + 1) <= number:
            epoch += 1
        return epoch

    def _groups_of(self, epoch: int) -> list[tuple[int, int]]:
        found = [
            (bucket, which)
            for bucket, group in enumerate(self.groups)
            for which in range(epoch * len(group) // self.size, (epoch + 1) * len(group) // self.size)
        ]
        order = torch.randperm(len(found), generator=generator(pair_key(self.seed, "order", epoch), "order"))
        return [found[i] for i in order.tolist()]

    def _visit(self, bucket: int, position: int) -> tuple[int, int]:
        """The pair at a position of a bucket's own line."""
        group = self.groups[bucket]
        draw, place = divmod(position, len(group))
        if self._drawn.get(bucket, (-1,))[0] != draw:
            key = pair_key(self.seed, f"order of bucket {bucket}", draw)
            self._drawn[bucket] = draw, torch.randperm(len(group), generator=generator(key, "order"))
        return group[int(self._drawn[bucket][1][place])], draw
