"""Offline pairs as micro-batches: from pixels through the encoders, or from a latent cache without any model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffalign.data.cache.latents import PairCache
from diffalign.data.cache.reference_errors import ReferenceErrors
from diffalign.data.cache.trajectories import Trajectories
from diffalign.data.loader.dataset import Visits, leave_signals_to_parent
from diffalign.data.loader.loaded import Loaded
from diffalign.data.loader.online import Encoding, Online, Pixels
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.loader.text import for_pairs, for_sides
from diffalign.data.row import DataError, Problem
from diffalign.data.sampler import positions_for
from diffalign.data.table.pairs import PairTable
from diffalign.types import Conditioning, PairBatch

log = logging.getLogger(__name__)

LatentSource = Online | PairCache | Trajectories | ReferenceErrors


class OfflinePairs:
    """A table of pairs as an endless stream of micro-batches.

    content: `Online(encoder, ...)`, what `open_cache` returned, or `Trajectories` or `ReferenceErrors` on top of that.
    spec: how pairs are drawn, grouped and read.
    time_ids: geometry "side pair 6" -> micro-conditioning or None; by default the online encoder's.

    `problems` names each row that could not be read so far.
    """

    def __init__(
        self,
        table: PairTable,
        content: LatentSource,
        spec: LoaderSpec,
        *,
        time_ids: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        table.require_usable()
        self.table, self.content, self.spec = table, content, spec
        self.problems: list[Problem] = []
        self._allowed = max(1, int(spec.max_unreadable * len(table)))
        masks, self._encode = "mask" in table.terms, None
        if isinstance(content, Online):
            self._encode = Encoding(content.encoder)
            self._null_text, self._time_ids = self._encode.null_text, time_ids or content.encoder.time_ids
            self.visits = Visits(table, Pixels(table, content), spec, content.factor if masks else None)
        else:
            cache = content.cache
            if cache.pairs != len(table):
                raise DataError(
                    f"the cache {cache.folder} has {cache.pairs} pairs and the table {len(table)}; open "
                    "both with the same data settings"
                )
            self._null_text, self._time_ids = cache.null_text, time_ids or _no_time_ids
            self.visits = Visits(table, content, spec, cache.factor if masks else None)

    def batches(self, first_step: int = 0) -> Iterator[PairBatch]:
        """Micro-batches of this process from optimiser step `first_step` on, without end.

        `gradient_accumulation_steps` of them make one step.
        """
        loader = DataLoader(
            self.visits,
            batch_sampler=_Positions(self.spec, first_step),
            collate_fn=_same,
            num_workers=self.spec.num_workers,
            pin_memory=self.spec.pin_memory,
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # its own: the loader must not draw from the global one
        )
        for loaded in _plainly(loader):
            if any(loaded.problems):
                self._note(loaded.problems)
            yield self.assemble(loaded)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the order of the pairs follows from seed and step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore. Raises DataError for the state of a source that has one."""
        if state:
            raise DataError(
                "this checkpoint is from a run that generated its own pairs; resume it with its `source` section"
            )

    def take_metrics(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def assemble(self, loaded: Loaded) -> PairBatch:
        """What a loader worker read as a batch: encoded where it is pixels, with the null prompt where it is needed."""
        if self._encode is not None:
            loaded = self._encode(loaded)
        assert loaded.latents is not None, "a cache has stored them"
        assert loaded.cond is not None, "a cache has stored it"
        time_ids = self._time_ids(loaded.geometry)

        def conditioning(text: Conditioning) -> Conditioning:
            return replace(text, time_ids=time_ids, user=loaded.user)

        null = None
        if self.spec.with_uncond:
            null = for_sides(for_pairs(self._null_text(), len(loaded.keys)), len(loaded.latents))
        return PairBatch(
            latents=loaded.latents,
            cond=conditioning(loaded.cond),
            keys=loaded.keys,
            uncond=None if null is None else conditioning(null),
            scores=loaded.scores,
            transitions=loaded.transitions,
            terms=loaded.terms,
            reference=loaded.reference,
            ids=loaded.ids,
        )

    def _note(self, problems: tuple[tuple[Problem, ...], ...]) -> None:
        known = {problem.where for problem in self.problems}
        for problem in dict.fromkeys(each for of_pair in problems for each in of_pair):
            if problem.where not in known:
                self.problems.append(problem)
                log.warning("replaced by another pair, each time: %s", problem)
        if len(self.problems) > self._allowed:
            raise DataError(
                f"{len(self.problems)} of {len(self.table)} pairs could not be read; a run tolerates at "
                f"most {self._allowed} (last: {self.problems[-1]}); `diffalign data check --full` lists "
                "them all: repair or remove them"
            )


class _Positions:
    """The positions of each micro-batch of a process, from a step on."""

    def __init__(self, spec: LoaderSpec, first_step: int) -> None:
        self.spec, self.first_step = spec, first_step

    def __iter__(self) -> Iterator[list[int]]:
        spec = self.spec
        for step in count(self.first_step):
            yield from positions_for(
                step, spec.train_batch_size, spec.gradient_accumulation_steps, spec.processes
            ).tolist()


def _plainly(loader: Iterable[Loaded]) -> Iterator[Loaded]:
    """The loader's batches; an error from a worker without the traceback that `DataLoader` wraps it in."""
    try:
        yield from loader
    except DataError as error:
        wrapped, name, message = str(error).rpartition(f"{type(error).__qualname__}: ")
        if name and "Original Traceback" in wrapped:
            raise DataError(message.strip()) from error
        raise


def _no_time_ids(geometry: Tensor) -> None:
    return None


def _same(loaded: Any) -> Any:
    return loaded  # `Visits` has made the batch already
