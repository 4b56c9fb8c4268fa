"""Rounds as an endless stream of micro-batches: make or read a round, order it, share it out, use it, go on.

    round r    every process makes pairs at its share of the round's prompts and writes them; after a barrier each reads
               all of them. One seeded permutation, the same everywhere, decides the order; an optimiser step takes the
               next pairs of it, split over micro-batches and processes as offline pairs are (`data/sampler.py`).

Used once (`steps_per_round` None), what is left of a round and fills no step goes first in the next one. Used for a
number of steps, the pairs are a pool that is visited in a new order as often as these steps need, with fresh draws.
The state is (round, steps used of it, pairs carried into it): a stop in the middle of a round re-reads its files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.data.loader.loaded import NULL_PROMPT
from diffalign.data.loader.text import TextMemo, for_pairs, for_sides
from diffalign.data.sampler import PairOrder, positions_for
from diffalign.engine.random import generator, pair_key, uniform
from diffalign.sources.base import Context, SourceError
from diffalign.sources.rounds import (
    About,
    Made,
    Place,
    Rollout,
    Round,
    damaged,
    made_of,
    remove_round,
    rounds_there,
    shares,
    write_share,
)
from diffalign.types import NO_TERMS, Conditioning, PairBatch, Terms, cat

log = logging.getLogger(__name__)

ROUNDS = "rounds"  # folder of the round files, inside the source's


Roll = Callable[[int, list[Place]], Rollout]  # a round's number and this process's places in it
Grade = Callable[[Tensor, Tensor], Terms]  # place int64 [n] and score [n] of all images of a round -> their terms


@dataclass(frozen=True)
class RoundSpec:
    """How rounds are made and used."""

    key: str  # hash of what their pairs depend on besides the policy, see `fingerprint`
    prompts_per_round: int  # places that all processes together visit in a round
    steps_per_round: int | None = None  # optimiser steps on the pairs of one round; None: each pair is used once
    keep_rounds: bool = False  # do not remove the files that no checkpoint needs
    grade: Grade | None = None  # from the scores of all processes; None: the pairs have no terms
    max_empty_rounds: int = 10  # rounds without a valid pair in a row after which the run stops with SourceError
    remedy: str = "lower the threshold of a valid pair, sample more images of a prompt, or try another scorer"


class RoundPairs:
    """Pairs that are made in rounds; a source.

    roll: makes this process's pairs at some places of a round; the only part that differs between methods.
    enter: called when a round begins, before `roll`, and when it is resumed (fresh False).
    """

    def __init__(
        self, context: Context, spec: RoundSpec, roll: Roll, enter: Callable[[int, bool], None] | None = None
    ) -> None:
        self.context, self.spec, self.roll, self.enter = context, spec, roll, enter
        self.folder = context.folder / ROUNDS
        self.text = TextMemo(context.encoder)
        self._order = PairOrder(len(context.table), context.spec.run_seed)
        step = context.spec.train_batch_size * context.spec.gradient_accumulation_steps
        self._per_step = step * context.spec.processes.num_processes
        self._step, self._round, self._used, self._empty = 0, 0, 0, 0
        self._carried: list[tuple[int, int]] = []  # (round, position in it), first in this round's line
        self._began: dict[int, int] = {}  # policy version of each round in use
        self._open: dict[int, Round] = {}
        self._terms: dict[int, Terms] = {}  # of the pairs of each open round
        self._metrics: dict[str, list[Tensor]] = {}

    def batches(self, first_step: int = 0) -> Iterator[PairBatch]:
        """Micro-batches of this process; see `Source`. Raises SourceError after too many empty rounds."""
        if first_step != self._step:
            raise SourceError(f"this source is at step {self._step}, and batches from step {first_step} were requested")
        spec = self.context.spec
        while True:
            line = self._begin()
            while self._used < line.steps:
                positions = positions_for(
                    self._used, spec.train_batch_size, spec.gradient_accumulation_steps, spec.processes
                ).tolist()
                for micro, part in enumerate(positions):
                    if micro == len(positions) - 1:  # the state is that of the step that this batch completes
                        self._used, self._step = self._used + 1, self._step + 1
                    yield self._batch([line(position) for position in part])
            self._end(line)

    def state_dict(self) -> dict[str, Any]:
        """Round, steps used of it, and what was carried into it; see `Source`."""
        return {
            "step": self._step,
            "round": self._round,
            "used": self._used,
            "empty": self._empty,
            "carried": [list(each) for each in self._carried],
            "began": {str(number): step for number, step in self._began.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state; the files of its rounds are read when `batches` is called.

        Raises SourceError for the state of a run whose pairs were there before it.
        """
        if "round" not in state:
            raise SourceError("this checkpoint is of a run on offline pairs; resume it without a `source` section")
        self._step, self._round, self._used = state["step"], state["round"], state["used"]
        self._empty = state["empty"]
        self._carried = [(number, position) for number, position in state["carried"]]
        self._began = {int(number): step for number, step in state["began"].items()}
        self._open = {}

    def take_metrics(self) -> dict[str, Tensor]:
        """Of the rounds begun since the last call: `rollout/pairs`, `rollout/empty`, `rollout/carried` and `roll`'s."""
        taken = {name: torch.cat(values) for name, values in self._metrics.items()}
        self._metrics = {}
        return taken

    def places(self, number: int) -> list[Place]:
        """The places of a round, of all processes."""
        first, table = number * self.spec.prompts_per_round, self.context.table
        rows = [(n, self._order(n)[0]) for n in range(first, first + self.spec.prompts_per_round)]
        return [Place(n, row, table.ids[row], table.prompts[row]) for n, row in rows]

    def _begin(self) -> Line:
        """The line of pairs of the current round, which is made unless its files are there."""
        fresh = self._used == 0
        if fresh:
            self._began[self._round] = self._step
        if self.enter is not None:
            self.enter(self._round, fresh)
        if fresh:
            self._make()
        for number in {self._round, *(number for number, _ in self._carried)}:
            if number not in self._open:
                opened = Round(self.folder, About(number, self._began[number], self.spec.key))
                self._open[number] = opened
                grade = self.spec.grade
                self._terms[number] = NO_TERMS if grade is None or not len(opened) else grade(*opened.images())
        if fresh:
            self._forget()
        pairs = len(self._open[self._round])
        if fresh:
            self._count(pairs)
        seed = pair_key(self.context.spec.run_seed, "round", self._round)
        if self.spec.steps_per_round is not None:
            return _pool(self._round, pairs, seed, self.spec.steps_per_round if pairs else 0)
        order = torch.randperm(pairs, generator=generator(seed, "order")).tolist()
        return _once([*self._carried, *((self._round, position) for position in order)], self._per_step)

    def _make(self) -> None:
        """Writes this process's share of the current round, unless the complete round is there already."""
        c, about = self.context, About(self._round, self._step, self.spec.key)
        c.wait()  # no process writes while others list the files
        files = shares(self.folder, about.round)
        fault = damaged(files)
        c.wait()
        if files and fault is None:
            log.info("round %d: using the pairs in %s", about.round, self.folder)
            self._found(c.spec.processes.share(files))
            return
        if fault is not None and c.main:
            log.warning("round %d is damaged and is made again: %s", about.round, fault)
        if c.main:
            remove_round(self.folder, about.round)  # what a killed run left of it
        c.wait()
        before = c.networks.image_forwards
        with c.networks.gathered():  # shares differ
            rollout = self.roll(about.round, c.spec.processes.share(self.places(about.round)))
        for name, values in rollout.metrics.items():
            self._note(name, values)
        made = Made(c.networks.image_forwards - before, rollout.metrics)
        write_share(self.folder, rollout.records, about, c.spec.processes, made)
        c.wait()

    def _found(self, files: list[Path]) -> None:
        """Counts cost and metrics of some shares, as if they were made now."""
        for file in files:
            made = made_of(file)
            if made is None:
                log.warning("%s is from an older version: unet_forwards does not include its cost", file)
                continue
            for name, values in made.metrics.items():
                self._note(name, values)
            self.context.networks.image_forwards += made.forwards

    def _count(self, pairs: int) -> None:
        """Counts the pairs of a round; stops the run when too many rounds in a row have none."""
        self._note("rollout/pairs", torch.tensor([float(pairs)]))
        self._note("rollout/carried", torch.tensor([float(len(self._carried))]))
        self._note("rollout/empty", torch.tensor([float(not pairs)]))
        self._empty = 0 if pairs else self._empty + 1
        if self._empty >= self.spec.max_empty_rounds:
            raise SourceError(
                f"{self._empty} rounds in a row, of {self.spec.prompts_per_round} prompts each, had no valid pair: "
                f"{self.spec.remedy}"
            )
        if not pairs and self.context.main:
            log.warning("round %d has no valid pair and is skipped", self._round)

    def _end(self, line: Line) -> None:
        """On to the next round, with what this one has left over."""
        self._carried = line.left
        self._round, self._used = self._round + 1, 0
        needed = {number for number, _ in self._carried}
        self._open = {number: opened for number, opened in self._open.items() if number in needed}
        self._terms = {number: terms for number, terms in self._terms.items() if number in needed}
        self._began = {number: step for number, step in self._began.items() if number in needed}

    def _forget(self) -> None:
        """Removes rounds that neither this one nor a checkpoint of the run needs."""
        if self.spec.keep_rounds or not self.context.main:
            return
        needed = {self._round, *(number for number, _ in self._carried)}
        for state in self.context.saved():
            needed |= {state["round"], *(number for number, _ in state["carried"])}
        for number in rounds_there(self.folder):
            if number < self._round and number not in needed:
                remove_round(self.folder, number)

    def _note(self, name: str, values: Tensor) -> None:
        self._metrics.setdefault(name, []).append(values)

    def _batch(self, visits: list[Visit]) -> PairBatch:
        c, table = self.context, self.context.table
        found = cat([self._open[visit.round][visit.position] for visit in visits])
        rows, sides = found.prompt.tolist(), len(found.latents)
        which = zip(rows, found.place.tolist(), found.index.tolist(), strict=True)
        names = [f"{table.ids[row]}\x1f{place}\x1f{index}" for row, place, index in which]
        draws = [visit.draw for visit in visits]
        keys = torch.tensor([pair_key(c.spec.run_seed, name, draw) for name, draw in zip(names, draws, strict=True)])
        prompts = tuple(table.prompts[row] for row in rows)
        if c.spec.prompt_dropout > 0:
            dropped = (uniform(keys, "prompt_dropout") < c.spec.prompt_dropout).tolist()
            prompts = tuple(NULL_PROMPT if d else prompt for d, prompt in zip(dropped, prompts, strict=True))
        own, moves = c.encoder.time_ids(found.geometry), found.transitions
        time_ids = None if own is None else _all_sides(own, sides)
        if moves is not None:
            moves = replace(moves, noisy=_all_sides(moves.noisy, sides), clean=_all_sides(moves.clean, sides))

        def conditioning(text: tuple[Tensor, Tensor | None]) -> Conditioning:
            return replace(for_sides(text, sides), time_ids=time_ids)

        return PairBatch(
            latents=found.latents,
            cond=conditioning(self.text(prompts)),
            keys=keys,
            uncond=conditioning(for_pairs(self.text((NULL_PROMPT,)), len(visits))) if c.spec.with_uncond else None,
            scores=found.scores,
            transitions=moves,
            terms=cat([self._terms[v.round].select(pair=slice(v.position, v.position + 1)) for v in visits]),
            ids=tuple(name.replace("\x1f", "/") for name in names),
        )


@dataclass(frozen=True)
class Visit:
    """A pair of a round, and how often it was visited before."""

    round: int
    position: int
    draw: int


@dataclass(frozen=True)
class Line:
    """The use of a round: `steps` optimiser steps, and the visit at each position."""

    steps: int
    visit: Callable[[int], Visit]
    left: list[tuple[int, int]]  # pairs that fill no step

    def __call__(self, position: int) -> Visit:
        return self.visit(position)


def _once(pairs: list[tuple[int, int]], per_step: int) -> Line:
    """Each pair once."""
    steps = len(pairs) // per_step
    return Line(steps, lambda position: Visit(*pairs[position], draw=0), pairs[steps * per_step :])


def _pool(number: int, pairs: int, seed: int, steps: int) -> Line:
    """The pairs in one order after the other, for so many steps."""
    order = PairOrder(max(1, pairs), seed)
    return Line(steps, lambda position: Visit(number, *order(position)), [])


def _all_sides(x: Tensor, sides: int) -> Tensor:
    """A tensor "side …" whose side axis of 1 is shared by all sides."""
    return x.expand(sides, *x.shape[1:])
