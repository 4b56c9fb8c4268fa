"""One visit of one pair, in a loader worker: read and crop its images, and replace a pair that cannot be read."""

from __future__ import annotations

import hashlib
import signal
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffalign.data.buckets.order import BucketOrder
from diffalign.data.buckets.sizes import Shapes
from diffalign.data.loader.loaded import NULL_PROMPT, Loaded
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.remote_shards import RemoteParquet
from diffalign.data.row import DataError, ImageError, Problem
from diffalign.data.sampler import BlockOrder, Order, PairOrder
from diffalign.data.table.pairs import PairTable
from diffalign.data.weights import on_latents, terms_of
from diffalign.engine.random import pair_key, uniform
from diffalign.types import NO_TERMS, Terms, cat

ATTEMPTS = 16  # substitutes tried for one unreadable pair; so many in a row mean that the images are no longer there


class Content(Protocol):
    """The store of the images of pairs: pixels to decode, or a cache."""

    shapes: Shapes

    def load(self, index: int, key: int, draw: int, prompt: str | None) -> Loaded:
        """One pair at one visit: its images, and its text where that is stored; `prompt` None means the null prompt.

        Raises ImageError.
        """

    def flip(self, name: str, key: int, draw: int) -> bool:
        """Whether the images of the pair called `name` are mirrored at this visit."""


class Visits(Dataset[Loaded]):
    """Positions of the order -> micro-batches. Every random draw belongs to the pair and the visit."""

    def __init__(self, table: PairTable, content: Content, spec: LoaderSpec, factor: int | None = None) -> None:
        """`factor`, pixels for a place of the latents, matters only where the data have masks."""
        self.table, self.content, self.spec, self.factor = table, content, spec, factor
        self.order: Order = PairOrder(len(table), spec.run_seed)
        if spec.order is not None:
            self.order = spec.order
        elif isinstance(table.columns, RemoteParquet):
            self.order = BlockOrder(table.columns.blocks(table.index.rows), spec.run_seed, spec.shuffle_buffer)
        elif content.shapes.bucket is not None:
            self.order = BucketOrder(content.shapes.groups, spec.run_seed, spec.train_batch_size)

    def __getitems__(self, positions: list[int]) -> Loaded:
        """The micro-batch of these positions (`DataLoader` fetches a batch by this one call)."""
        return cat([self.visit(position) for position in positions])

    def visit(self, position: int) -> Loaded:
        """The pair that the order names at a position, or its substitute."""
        first, draw = self.order(position)
        if self.spec.draws is not None:
            draw %= self.spec.draws
        index = first
        problems: list[Problem] = []
        for attempt in range(ATTEMPTS):
            try:
                return self.pair(index, draw, tuple(problems))
            except ImageError as error:
                problems.append(Problem(self.table.where(index), error.kind, str(error)))
                peers = self.content.shapes.peers(first, len(self.table))
                index = peers[substitute(self.table.ids[first], attempt, len(peers))]
        if len(self.content.shapes.peers(first, len(self.table))) == 1 < len(self.table):
            width, height = self.content.shapes[first]
            kind = f"pair of the aspect bucket {width}x{height}"
            if not self.content.shapes.name:  # squares by the length of their lists
                kind = f"list of {self.table.count(first)} images"
            raise DataError(
                f"{problems[0]}; it is the only {kind}, so no other can stand in for it: repair or remove it "
                "(`diffalign data check --full` lists such rows)"
            )
        raise DataError(
            f"{self.table.where(first)} cannot be read and neither can {ATTEMPTS - 1} substitutes (last: "
            f"{problems[-1]}); do the images still exist? `diffalign data check` lists all unreadable "
            "ones"
        )

    def pair(self, index: int, draw: int, problems: tuple[Problem, ...] = ()) -> Loaded:
        """A pair at its visit; `problems`: of pairs it stands in for. Raises ImageError where it cannot be read."""
        table, name = self.table, self.table.ids[index]
        key = pair_key(self.spec.run_seed, name, draw)
        prompt = table.prompts[index] if self._keeps_prompt(key) else None
        loaded = self.content.load(index, key, draw, prompt)
        scores, user = table.scores(index), table.user(index)
        return replace(
            loaded,
            user=None if user is None else user.expand(table.count(index), 1, -1),
            scores=None if scores is None else torch.tensor(scores, dtype=torch.float32)[:, None],
            terms=self._terms(index, key, draw, loaded.geometry[:, 0]) if table.terms else NO_TERMS,
            ids=(name,),
            prompts=(NULL_PROMPT if prompt is None else prompt,),
            problems=(problems,),
        )

    def _keeps_prompt(self, key: int) -> bool:
        """Whether this visit sees the pair's prompt and not the null prompt."""
        dropout = self.spec.prompt_dropout
        return dropout <= 0 or float(uniform(torch.tensor([key], dtype=torch.int64), "prompt_dropout")) >= dropout

    def _terms(self, index: int, key: int, draw: int, geometry: Tensor) -> Terms:
        """The pair's terms; its mask on the latents, cropped and flipped as they are at this visit."""
        mask, grid = None, self.table.mask(index)
        if grid is not None and self.factor is not None:
            where = self.table.where(index)
            if not self.spec.signed_masks and bool((grid < 0).any()):
                raise DataError(
                    f"{where}: its mask goes below 0, which this run's objective does not support; write values from "
                    "0 to 1"
                )
            flip = self.content.flip(self.table.ids[index], key, draw)
            mask = on_latents(grid, geometry, flip=flip, factor=self.factor, where=where)
        return terms_of(self.table.numbers(index), mask)


def substitute(pair_id: str, attempt: int, n: int) -> int:
    """Index of the pair that stands in for an unreadable one; a function of that pair's id, not of the run."""
    digest = hashlib.blake2b(f"{pair_id}\x1f{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % n


def leave_signals_to_parent(_: int = 0) -> None:
    """For a loader's worker (`worker_init_fn`): who stops a run signals all its processes, and the parent, which still
    finishes its step, needs its workers for that. They end with it; a second SIGTERM ends them as well.
    """

    def first(signum: int, _: object) -> None:
        signal.signal(signum, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, first)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
