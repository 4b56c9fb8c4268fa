"""One visit of one pair, as done in a loader worker: read, crop or look up, and replace what cannot be read."""

from __future__ import annotations

import hashlib
import signal
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.row import DataError, ImageError, Problem
from diffalign.data.sampler import PairOrder
from diffalign.data.table.pairs import PairTable
from diffalign.data.transforms import flips, prepare_pair
from diffalign.data.weights import on_latents
from diffalign.engine.random import normal, pair_key, uniform

ATTEMPTS = 16  # substitutes tried for one unreadable pair; so many in a row mean that the images are gone
NULL_PROMPT = ""


@dataclass(frozen=True)
class Loaded:
    """A micro-batch as it leaves a worker; either pixels (text still to be encoded) or latents with text."""

    keys: Tensor  # int64 [pair]
    geometry: Tensor  # int64 "pair side 6"
    ids: tuple[str, ...]
    prompts: tuple[str, ...]  # after dropout
    problems: tuple[Problem, ...]
    pixels: Tensor | None = None  # "pair side 3 H W"
    latents: Tensor | None = None  # "pair side c h w"
    prompt_embeds: Tensor | None = None  # "pair tokens dim"
    pooled: Tensor | None = None  # "pair dim"
    scores: Tensor | None = None  # "pair side"
    weight: Tensor | None = None  # [pair]
    margin: Tensor | None = None  # [pair]
    mask: Tensor | None = None  # "pair h w"
    users: Tensor | None = None  # "pair dim"
    reference: Tensor | None = None  # "pair side [point]", kept errors of the reference
    noisy: Tensor | None = None  # "pair side point c h w", with clean, t and t_prev [pair point]: see `Transitions`
    clean: Tensor | None = None
    t: Tensor | None = None
    t_prev: Tensor | None = None

    def pin_memory(self) -> Loaded:
        """A copy in pinned memory; `DataLoader` calls this."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        pinned = {name: x.pin_memory() for name, x in values.items() if isinstance(x, Tensor)}
        return Loaded(**(values | pinned))


class Content(Protocol):
    """Where the two images of a pair come from."""

    def load(self, index: int, key: int, draw: int, prompt: str | None) -> dict[str, Tensor]:
        """Unbatched fields of `Loaded` for one visit; `prompt` None means the null prompt. Raises ImageError."""

    def flip(self, name: str, key: int, draw: int) -> bool:
        """Whether the images of the pair called `name` are mirrored at this visit."""


class Pixels:
    """Images decoded and cropped at every visit."""

    def __init__(self, table: PairTable, resolution: int, *, center_crop: bool, random_flip: bool) -> None:
        self.table, self.resolution = table, resolution
        self.center_crop, self.random_flip = center_crop, random_flip

    def load(self, index: int, key: int, draw: int, prompt: str | None) -> dict[str, Tensor]:
        pixels, geometry = prepare_pair(
            self.table[index],
            self.resolution,
            key=key,
            center_crop=self.center_crop,
            random_flip=self.random_flip,
        )
        return {"pixels": pixels, "geometry": geometry}

    def flip(self, name: str, key: int, draw: int) -> bool:
        return self.random_flip and flips(key)


class Visits(Dataset[Loaded]):
    """Positions of the order -> micro-batches. Everything drawn here belongs to the pair and the visit."""

    def __init__(self, table: PairTable, content: Content, spec: LoaderSpec, latent_side: int | None = None) -> None:
        """`latent_side` matters only where the data have masks."""
        self.table, self.content, self.spec, self.latent_side = table, content, spec, latent_side
        self.order = PairOrder(len(table), spec.run_seed) if spec.order is None else spec.order

    def __getitems__(self, positions: list[int]) -> Loaded:
        """The micro-batch of these positions (`DataLoader` fetches a batch by this one call)."""
        return self.together([self.visit(position) for position in positions])

    def together(self, visits: list[Visit]) -> Loaded:
        """Some visits as a micro-batch."""
        names = visits[0].tensors
        scores = [visit.scores for visit in visits if visit.scores is not None]
        users = [visit.user for visit in visits if visit.user is not None]
        return Loaded(
            keys=torch.tensor([visit.key for visit in visits], dtype=torch.int64),
            ids=tuple(visit.id for visit in visits),
            prompts=tuple(visit.prompt for visit in visits),
            problems=tuple(problem for visit in visits for problem in visit.problems),
            scores=torch.tensor(scores, dtype=torch.float32) if scores else None,
            weight=_column([visit.weight for visit in visits]),
            margin=_column([visit.margin for visit in visits]),
            users=torch.stack(users) if users else None,
            **{name: torch.stack([visit.tensors[name] for visit in visits]) for name in names},
        )

    def visit(self, position: int) -> Visit:
        """What is seen at a position: the pair that the order names, or its substitute."""
        first, draw = self.order(position)
        if self.spec.draws is not None:
            draw %= self.spec.draws
        index = first
        problems: list[Problem] = []
        for attempt in range(ATTEMPTS):
            try:
                return self.look(index, draw, tuple(problems))
            except ImageError as error:
                problems.append(Problem(self.table.where(index), error.kind, str(error)))
                index = substitute(self.table.ids[first], attempt, len(self.table))
        raise DataError(
            f"{self.table.where(first)} cannot be read and neither can {ATTEMPTS - 1} substitutes (last: "
            f"{problems[-1]}); do the images still exist? `diffalign data check` lists all unreadable "
            "ones"
        )

    def look(self, index: int, draw: int, problems: tuple[Problem, ...] = ()) -> Visit:
        """What a pair shows at its visit `draw`. Raises ImageError where it cannot be read."""
        name, prompt = self.table.ids[index], self.table.prompts[index]
        key = pair_key(self.spec.run_seed, name, draw)
        keys = torch.tensor([key], dtype=torch.int64)
        dropped = self.spec.prompt_dropout > 0 and float(uniform(keys, "prompt_dropout")) < self.spec.prompt_dropout
        tensors = self.content.load(index, key, draw, None if dropped else prompt)
        mask = self._mask(index, name, key, draw, tensors["geometry"])
        if mask is not None:
            tensors = {**tensors, "mask": mask}
        weight, margin = self.table.number("weight", index), self.table.number("margin", index)
        scores = self.table.scores(index)
        user = self.table.user(index)
        return Visit(name, key, NULL_PROMPT if dropped else prompt, tensors, scores, problems, weight, margin, user)

    def _mask(self, index: int, name: str, key: int, draw: int, geometry: Tensor) -> Tensor | None:
        """The pair's mask on the latents as they are cropped and flipped at this visit."""
        grid = self.table.mask(index)
        if grid is None or self.latent_side is None:
            return None
        where = self.table.where(index)
        if not self.spec.signed_masks and bool((grid < 0).any()):
            raise DataError(
                f"{where}: its mask goes below 0, which this run's objective does not support; write values from 0 to 1"
            )
        return on_latents(grid, geometry, flip=self.content.flip(name, key, draw), side=self.latent_side, where=where)


def _column(values: list[float | None]) -> Tensor | None:
    """Float32 [pair], or None where the data have no such column."""
    there = [value for value in values if value is not None]
    return torch.tensor(there, dtype=torch.float32) if there else None


@dataclass(frozen=True)
class Visit:
    """One pair of a micro-batch; `tensors` are its fields of `Loaded`."""

    id: str
    key: int
    prompt: str
    tensors: dict[str, Tensor]
    scores: tuple[float, float] | None
    problems: tuple[Problem, ...]
    weight: float | None = None
    margin: float | None = None
    user: Tensor | None = None


def substitute(pair_id: str, attempt: int, n: int) -> int:
    """Index of the pair that stands in for an unreadable one; a function of that pair's id, not of the run."""
    digest = hashlib.blake2b(f"{pair_id}\x1f{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % n


def sample_latents(moments: Tensor, keys: Tensor) -> Tensor:
    """Latents float32 "pair side c h w": mean + std · normal, drawn per pair, from moments "pair side 2c h w"."""
    mean, std = moments.float().chunk(2, dim=2)
    return mean + std * normal(keys, "vae", mean.shape[1:]).to(mean.device, non_blocking=True)


def leave_signals_to_parent(_: int = 0) -> None:
    """For a loader's worker (`worker_init_fn`): who stops a run signals all its processes, and the parent, which still
    finishes its step, needs its workers for that. They end with it; a second SIGTERM ends them as well.
    """

    def first(signum: int, _: object) -> None:
        signal.signal(signum, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, first)
