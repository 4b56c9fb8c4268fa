"""Offline pairs as micro-batches: from pixels through the encoders, or from an encode cache without any model."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffalign.data.cache.latents import PairCache
from diffalign.data.cache.reference_errors import ReferenceErrors
from diffalign.data.cache.trajectories import Trajectories
from diffalign.data.encoder import Encoder
from diffalign.data.finite import LatentsGuard, require_text
from diffalign.data.loader.dataset import (
    NULL_PROMPT,
    Content,
    Loaded,
    Pixels,
    Visits,
    leave_signals_to_parent,
    sample_latents,
)
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.row import DataError, Problem
from diffalign.data.sampler import positions_for
from diffalign.data.table.pairs import PairTable
from diffalign.types import Conditioning, PairBatch, Transitions

log = logging.getLogger(__name__)

TEXT_MEMO = 256  # prompts whose embeddings stay on the encoder's device (SDXL: 0.6 MB each)


@dataclass(frozen=True)
class Online:
    """Encode at every visit: no preparation, but VAE and text encoders stay resident."""

    encoder: Encoder
    resolution: int
    center_crop: bool = True
    random_flip: bool = False


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
        content: Online | PairCache | Trajectories | ReferenceErrors,
        spec: LoaderSpec,
        *,
        time_ids: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        table.require_usable()
        self.table, self.content, self.spec = table, content, spec
        self.problems: list[Problem] = []
        self._guard = LatentsGuard()
        self._allowed = max(1, int(spec.max_unreadable * len(table)))
        source: Content
        side: int | None = None  # of the latents, where masks need it
        if isinstance(content, Online):
            self._encoder: Encoder | None = content.encoder
            self._time_ids = time_ids or content.encoder.time_ids
            source = Pixels(table, content.resolution, center_crop=content.center_crop, random_flip=content.random_flip)
            self._text = TextMemo(content.encoder)
            if "mask" in table.terms:
                with torch.no_grad():
                    side = content.encoder.moments(torch.zeros(1, 3, content.resolution, content.resolution)).shape[-1]
            self._null_text: Callable[[], tuple[Tensor, Tensor | None]] = partial(_null_text, self._text)
        else:
            cache = content if isinstance(content, PairCache) else content.cache
            if cache.pairs != len(table):
                raise DataError(
                    f"the cache {cache.folder} has {cache.pairs} pairs and the table {len(table)}; open "
                    "both with the same data settings"
                )
            side = cache.latent_shape[-1] if "mask" in table.terms else None
            self._encoder, self._time_ids, source = None, time_ids or _no_time_ids, content
            self._null_text = cache.null_text
        self.visits = Visits(table, source, spec, side)

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
            self._note(loaded.problems)
            yield self.assemble(loaded)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the order of the pairs follows from seed and step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up. Raises DataError for the state of a source that has one."""
        if state:
            raise DataError(
                "this checkpoint is from a run that generated its own pairs; resume it with its `source` section"
            )

    def take_metrics(self) -> dict[str, Tensor]:
        """Nothing to say."""
        return {}

    def assemble(self, loaded: Loaded) -> PairBatch:
        """What a loader worker brought as a batch: encoded where it is pixels, with the null prompt where wanted."""
        if self._encoder is None:
            assert loaded.latents is not None, "a cache loads them"
            assert loaded.prompt_embeds is not None, "a cache loads them"
            latents, embeds, pooled = loaded.latents, loaded.prompt_embeds, loaded.pooled
        else:
            assert loaded.pixels is not None, "Pixels loads them"
            with torch.no_grad():
                pairs = loaded.pixels.shape[0]
                moments = self._encoder.moments(loaded.pixels.flatten(0, 1))
                self._guard(moments.reshape(pairs, -1), [f"pair {name}" for name in loaded.ids])
                latents = sample_latents(moments.unflatten(0, (pairs, 2)), loaded.keys)
                embeds, pooled = self._text(loaded.prompts)
        time_ids = self._time_ids(loaded.geometry.transpose(0, 1))
        return PairBatch(
            latents=latents.transpose(0, 1),
            cond=_conditioning(embeds, pooled, time_ids, loaded.users),
            keys=loaded.keys,
            uncond=self._uncond(len(loaded.ids), time_ids, loaded.users) if self.spec.with_uncond else None,
            scores=None if loaded.scores is None else loaded.scores.transpose(0, 1),
            transitions=_transitions(loaded),
            weight=loaded.weight,
            margin=loaded.margin,
            mask=loaded.mask,
            reference=None if loaded.reference is None else loaded.reference.transpose(0, 1),
            ids=loaded.ids,
        )

    def _uncond(self, pairs: int, time_ids: Tensor | None, users: Tensor | None) -> Conditioning:
        embeds, pooled = self._null_text()
        return _conditioning(
            embeds.expand(pairs, *embeds.shape),
            None if pooled is None else pooled.expand(pairs, *pooled.shape),
            time_ids,
            users,
        )

    def _note(self, problems: tuple[Problem, ...]) -> None:
        known = {problem.where for problem in self.problems}
        for problem in dict.fromkeys(problems):
            if problem.where not in known:
                self.problems.append(problem)
                log.warning("replaced by another pair, each time: %s", problem)
        if len(self.problems) > self._allowed:
            raise DataError(
                f"{len(self.problems)} of {len(self.table)} pairs could not be read; a run tolerates at "
                f"most {self._allowed} (last: {self.problems[-1]}); `diffalign data check --full` lists "
                "them all: repair or remove them"
            )


class TextMemo:
    """Embeddings of unique prompts, the latest ones kept; float32, on the encoder's device."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._kept: OrderedDict[str, tuple[Tensor, Tensor | None]] = OrderedDict()

    def __call__(self, prompts: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        """Embeddings [pair tokens dim] and, where the family has it, the pooled ones [pair dim]."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        for prompt in new:
            # One a call: a batch of another size rounds otherwise, and what is new depends on where the run began.
            text = self.encoder.prompts([prompt])
            if text.prompt_embeds.device.type != "cuda":  # there it would wait, once for each new prompt
                require_text((text.prompt_embeds, text.pooled), [prompt])
            pooled = None if text.pooled is None else text.pooled[0].float()
            self._kept[prompt] = (text.prompt_embeds[0].float(), pooled)
        found = [self._kept[prompt] for prompt in prompts]
        for prompt in prompts:
            self._kept.move_to_end(prompt)
        while len(self._kept) > TEXT_MEMO:
            self._kept.popitem(last=False)
        pools = [pooled for _, pooled in found if pooled is not None]
        return torch.stack([embeds for embeds, _ in found]), torch.stack(pools) if pools else None


class _Positions:
    """The positions of each micro-batch of a process, from a step on."""

    def __init__(self, spec: LoaderSpec, first_step: int) -> None:
        self.spec, self.first_step = spec, first_step

    def __iter__(self) -> Iterator[list[int]]:
        spec = self.spec
        for step in count(self.first_step):
            yield from positions_for(
                step, spec.train_batch_size, spec.gradient_accumulation_steps, *astuple(spec.processes)
            ).tolist()


def _plainly(loader: Iterable[Loaded]) -> Iterator[Loaded]:
    """What a loader brings; an error of a worker's without the traceback that `DataLoader` wraps it in."""
    try:
        yield from loader
    except DataError as error:
        wrapped, name, said = str(error).rpartition(f"{type(error).__qualname__}: ")
        if name and "Original Traceback" in wrapped:
            raise DataError(said.strip()) from error
        raise


def _transitions(loaded: Loaded) -> Transitions | None:
    if loaded.noisy is None:
        return None
    assert loaded.clean is not None
    assert loaded.t is not None
    assert loaded.t_prev is not None
    return Transitions(loaded.noisy.transpose(0, 1), loaded.clean.transpose(0, 1), loaded.t, loaded.t_prev)


def _null_text(text: TextMemo) -> tuple[Tensor, Tensor | None]:
    embeds, pooled = text((NULL_PROMPT,))
    return embeds[0], None if pooled is None else pooled[0]


def _conditioning(embeds: Tensor, pooled: Tensor | None, time_ids: Tensor | None, users: Tensor | None) -> Conditioning:
    """Both sides see one prompt and one user: a view over the side axis."""

    def shared(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(2, *x.shape)

    return Conditioning(embeds.expand(2, *embeds.shape), shared(pooled), time_ids, shared(users))


def _no_time_ids(geometry: Tensor) -> None:
    return None


def _same(loaded: Any) -> Any:
    return loaded  # `Visits` has made the batch already
