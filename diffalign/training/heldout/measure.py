"""Measuring an objective on held-out pairs, at points (t, ε) that are the same at every measurement.

The points of a pair follow from `validation.pairs_seed` and the pair's id, so no number depends on the batch, the
number of processes or the order of the pairs, and no random draw of the training changes. Where an objective draws t
and ε itself (`OnSharedNoise`), the range of t is cut into as many strata as there are points, and a point is drawn in
each. Other objectives choose their points as in training. Prompts are not dropped, and images are neither mirrored nor
cropped at random.

A margin is the difference of the sides' implicit rewards, policy against reference where the objective has one. An
objective that does not compare the sides (SFT) has a loss alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.row import ImageError
from diffalign.data.sampler import ALONE, Processes
from diffalign.engine.measure import errors, measure, weighed
from diffalign.engine.random import pair_key
from diffalign.io.progress import Progress
from diffalign.models.policy.networks import Networks
from diffalign.objectives import Objective
from diffalign.objectives.base import SharedNoise, ask, shared_points
from diffalign.types import PairBatch, Probe, cat, sides_share

log = logging.getLogger(__name__)

MEMORY = 2**30  # bytes of encoded pairs that stay in memory between measurements


@dataclass(frozen=True)
class PointValues:
    """One point of one pair."""

    pair: int  # its index in the table
    point: int  # which of the pair's points
    t: int | None  # None where the value is of several timesteps
    loss: float
    margin: float | None  # None for an objective that does not compare the sides


@dataclass
class FixedPoints:
    """Pairs and the points at which they are measured."""

    source: OfflinePairs  # its spec's seed draws the points
    points: int  # of each pair
    batch_size: int  # pairs in a forward
    processes: Processes = ALONE  # this process measures its share
    title: str = ""  # of a progress bar; empty: none
    _batches: dict[int, PairBatch] = field(default_factory=dict)  # encoded pairs on the CPU, by first index
    _reference: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # its errors, by first index and point
    _bytes: int = 0
    _unreadable: set[str] = field(default_factory=set)

    def ask_reference(self, objective: Objective, networks: Networks) -> None:
        """Measures the reference's errors at all points of this process, for a run whose reference will be freed."""
        before = networks.image_forwards
        for first, index, batch in self._groups(networks.device):
            for point in range(self.points):
                self._probe(objective, networks, batch, (first, point), index)
        networks.image_forwards = before

    @torch.no_grad()
    def values(self, objective: Objective, networks: Networks) -> list[PointValues]:
        """Every point of the readable pairs that this process measures.

        Images that go through the networks are not counted: `training.max_unet_forwards` limits the training alone.
        """
        before, found = networks.image_forwards, []
        for first, index, batch in self._groups(networks.device):
            for point in range(self.points):
                probe = self._probe(objective, networks, batch, (first, point), index)
                evidence = measure(networks, probe)
                score = weighed(objective.score(evidence), evidence)
                margin = score.metrics.get("rewards/margins", score.logit)
                margins = [None] * len(index) if margin is None else margin.tolist()
                times = [None] * len(index) if probe.t.ndim == 2 else probe.t.tolist()
                rows = zip(index, times, score.loss.tolist(), margins, strict=True)
                found += [PointValues(pair, point, t, loss, m) for pair, t, loss, m in rows]
        networks.image_forwards = before
        return found

    def _probe(
        self, objective: Objective, networks: Networks, batch: PairBatch, place: tuple[int, int], index: Sequence[int]
    ) -> Probe:
        """The probe of a point, with the reference's errors where they are the same at every measurement."""
        table, seed = self.source.table, self.source.spec.run_seed
        keys = [pair_key(seed, table.ids[i], place[1]) for i in index]
        batch = replace(batch, keys=torch.tensor(keys, dtype=torch.int64))
        shared = shared_points(objective)
        if shared is not None:
            shared = in_stratum(shared, place[1], self.points, networks.schedule.num_train_timesteps)
        probe = ask(objective, batch, networks, shared)
        if objective.drawn is None or not probe.needs_reference or probe.needs_distance:
            return probe  # its points move with a network that determines them, or errors alone do not serve the loss
        if place not in self._reference:
            with torch.no_grad():
                self._reference[place] = errors(networks.reference, probe)
        return replace(probe, reference=self._reference[place])

    def _groups(self, device: torch.device) -> Iterator[tuple[int, list[int], PairBatch]]:
        """The batches of this process, each with its first index and those of its readable pairs."""
        every, size = range(len(self.source.table)), self.batch_size
        same: Sequence[Sequence[int]] = self.source.visits.content.shapes.groups or [every]
        parts = self.processes.share([some[i : i + size] for some in same for i in range(0, len(some), size)])
        for some in Progress(parts, desc=self.title, unit=" batches", delay=3.0, disable=not self.title):
            index, batch = self._group(some)
            if batch is not None:
                yield some[0], index, batch.to(device)

    def _group(self, pairs: Sequence[int]) -> tuple[list[int], PairBatch | None]:
        if (known := self._batches.get(pairs[0])) is not None:
            return [i for i in pairs if self.source.table.where(i) not in self._unreadable], known
        index, loaded = [], []
        for i in pairs:
            try:
                loaded.append(self.source.visits.pair(i, 0))
                index.append(i)
            except ImageError as error:
                self._leave_out(i, error)
        if not loaded:
            return [], None
        batch = self.source.assemble(cat(loaded)).to("cpu")
        size = sum(x[:1].nbytes if sides_share(x) else x.nbytes for x in batch.tensors())
        if self._bytes + size <= MEMORY:
            self._bytes += size
            self._batches[pairs[0]] = batch
        return index, batch

    def _leave_out(self, index: int, error: ImageError) -> None:
        """Logs an unreadable pair once."""
        where = self.source.table.where(index)
        if where not in self._unreadable:
            self._unreadable.add(where)
            log.warning("held-out pair left out: %s: %s", where, error)


def in_stratum(points: SharedNoise, point: int, strata: int, timesteps: int) -> SharedNoise:
    """Points in one of so many equal parts of the range of t, or of the timesteps that the objective draws from.

    Within a part every t is as likely as any other, whatever the density of the training is.
    """
    allowed = tuple(range(timesteps)) if points.timesteps is None else tuple(sorted(points.timesteps))
    first, end = point * len(allowed) // strata, (point + 1) * len(allowed) // strata
    return replace(points, timesteps=allowed[first : max(end, first + 1)], density=None)
