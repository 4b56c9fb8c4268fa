"""Filling a latent cache: shard by shard, resumable, by any number of processes and of runs at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from diffalign.data.buckets.sizes import Shapes
from diffalign.data.cache.latents import (
    DTYPES,
    CacheKey,
    CacheSpec,
    Plan,
    cache_key,
    differences,
    manifest_text,
    read_cache_manifest,
)
from diffalign.data.cache.shards import (
    MANIFEST,
    fill,
    not_finite,
    require_room,
    sweep,
    write_cache_manifest,
)
from diffalign.data.encoder import Encoder
from diffalign.data.finite import OVERFLOW
from diffalign.data.loader.dataset import leave_signals_to_parent
from diffalign.data.loader.loaded import NULL_PROMPT
from diffalign.data.precompute.recording import Work
from diffalign.data.row import DataError, ImageError, Problem
from diffalign.data.table.pairs import PairTable
from diffalign.data.transforms import prepare_pair
from diffalign.engine.random import pair_key
from diffalign.io.progress import Progress

WORK = Work()


@dataclass(frozen=True)
class Encoded:
    """The result of one call of `encode_cache`."""

    folder: Path
    key: CacheKey
    shards_written: int
    shards_found: int  # finished by an earlier, interrupted call or meanwhile by another run
    shards_missing: int  # still to be written by other processes
    problems: tuple[Problem, ...]  # pairs that could not be read; training substitutes them


def encode_cache(
    table: PairTable,
    encoder: Encoder,
    cache_dir: str | Path,
    spec: CacheSpec,
    work: Work = WORK,
) -> Encoded:
    """Encode every usable pair and every unique prompt, and the null prompt.

    Variant v of a pair is what online training with `spec.run_seed` sees at its visit v. This process writes its share
    of the shards.

    Call it again after an interruption: finished shards are used, and damaged ones are made again. Raises DataError
    when the folder holds a cache of something else, and for a pair or prompt whose values are not finite, by name;
    NoSpaceError when the disk has no room for what is missing.
    """
    spec = replace(spec, variants=spec.variants or 1, dtype=spec.dtype or "float32")
    key = cache_key(table, encoder.fingerprint, spec)
    folder = Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = list(dict.fromkeys([NULL_PROMPT, *table.prompts]))
    sides = max(map(table.count, range(len(table))))  # a shorter list is filled up with zeros
    plan, hashed = _agree(
        folder, key, lambda: _plan(encoder, key, spec.shapes, (sides, len(prompts)), work.shard_bytes)
    )
    sweep(folder)
    require_room(folder, plan.missing_bytes(folder), "the latent cache")
    job = _Job(table, encoder, key, spec, plan, prompts, work)
    text, images = (work.processes.share(names) for names in (plan.text_shards(), plan.moments_shards()))
    written = fill(folder, text, hashed, "prompts", job.text) + fill(folder, images, hashed, "images", job.moments)
    problems = tuple(problem for _, problem in sorted(job.problems.items()))
    found = len(text) + len(images) - written
    return Encoded(folder, key, written, found, len(plan.missing(folder)), problems)


@dataclass(frozen=True)
class _Job:
    """Makes the shards of one cache by name."""

    table: PairTable
    encoder: Encoder
    key: CacheKey
    spec: CacheSpec
    plan: Plan
    prompts: list[str]  # each once, the null prompt first
    work: Work
    problems: dict[int, Problem] = field(default_factory=dict)  # by index of the pair

    @cached_property
    def rows(self) -> dict[str, int]:
        """The row of each prompt in the text shards."""
        return {prompt: row for row, prompt in enumerate(self.prompts)}

    def text(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of one text shard."""
        first = int(name[5:10]) * self.plan.prompts_per_shard
        prompts = self.prompts[first : first + self.plan.prompts_per_shard]
        return _encode_text(self.encoder, prompts, DTYPES[str(self.key.dtype)], self.work.batch_size), {}

    def moments(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of one moments shard; pairs that cannot be read go to `problems`."""
        first = int(name[8:13]) * self.plan.pairs_per_shard
        indices = range(first, min(first + self.plan.pairs_per_shard, self.plan.pairs))
        images = _Pixels(self.table, indices, self.spec)
        places = self.plan.factor and places_of(self.spec.shapes, self.plan.factor)
        tensors, unreadable = _encode_pixels(self.encoder, images, places, self.work)
        for row, each in unreadable.items():
            index = indices[int(row)]
            self.problems[index] = Problem(self.table.where(index), each["kind"], each["reason"])
        tensors["text_row"] = torch.tensor([self.rows[self.table.prompts[i]] for i in indices])
        return tensors, {"unreadable": json.dumps(unreadable)} if unreadable else {}


def _agree(folder: Path, key: CacheKey, make: Callable[[], Plan]) -> tuple[Plan, bool]:
    """The plan of the cache that is begun here, or a new one that is then written; and whether shards have hashes."""
    leftovers = sorted(folder.glob("*.safetensors"))  # listed first: another run may be just beginning
    if read_cache_manifest(folder) is None:
        if leftovers:
            raise DataError(
                f"{folder} contains {leftovers[0].name} but no {MANIFEST}; name an empty folder for the cache"
            )
        write_cache_manifest(folder, manifest_text(key, make()))
    found = read_cache_manifest(folder)
    if found is None:
        raise DataError(f"{folder / MANIFEST} was removed while the cache was being created; encode again")
    if lines := differences(found[0], key):
        head = f"{folder} contains a different latent cache; delete it or name another folder:"
        raise DataError("\n".join([head, *lines]))
    return found[1], found[2]


def _plan(encoder: Encoder, key: CacheKey, shapes: Shapes, counts: tuple[int, int], shard_bytes: int) -> Plan:
    """Shard sizes, from the encoder's answer to one blank image and the null prompt.

    counts: images of the longest list (2 where the data are pairs), and unique prompts.
    """
    sides, prompts = counts
    width = torch.finfo(DTYPES[str(key.dtype)]).bits // 8
    with torch.no_grad():
        moments = encoder.moments(torch.zeros(1, 3, *reversed(shapes.sizes[0])))
        text = encoder.prompts([NULL_PROMPT])
    factor = shapes.sizes[0][0] // moments.shape[-1] if shapes.bucket is not None else 0
    numbers = moments.shape[1] * places_of(shapes, factor) if factor else moments.numel()
    pair_bytes = sides * numbers * int(key.variants or 1) * width
    text_bytes = (text.prompt_embeds.numel() + (0 if text.pooled is None else text.pooled.numel())) * width
    return Plan(
        key.pairs,
        max(1, shard_bytes // max(1, pair_bytes)),
        prompts,
        max(1, shard_bytes // max(1, text_bytes)),
        pair_bytes,
        text_bytes,
        factor,
    )


def places_of(shapes: Shapes, factor: int) -> int:
    """The places of the latents of the largest size."""
    return max((width // factor) * (height // factor) for width, height in shapes.sizes)


class _Pixels(Dataset[tuple[Tensor, Tensor] | dict[str, str]]):
    """All variants of the pairs of one shard: pixels and geometry, or why the pair cannot be read."""

    def __init__(self, table: PairTable, indices: range, spec: CacheSpec) -> None:
        self.table, self.indices, self.spec, self.shapes = table, indices, spec, spec.shapes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor] | dict[str, str]:
        index = self.indices[place]
        sides = []
        try:
            row = self.table[index]
            for variant in range(self.spec.variants or 1):
                pixels_and_geometry = prepare_pair(
                    row,
                    self.shapes[index],
                    key=pair_key(self.spec.run_seed, row.id, variant),
                    center_crop=self.spec.center_crop,
                    random_flip=self.spec.random_flip,
                )
                sides.append(pixels_and_geometry)
        except ImageError as error:
            return {"kind": error.kind, "reason": str(error)}
        return torch.stack([pixels for pixels, _ in sides]), torch.stack([geometry for _, geometry in sides])


def _encode_pixels(
    encoder: Encoder, job: _Pixels, places: int, work: Work
) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
    """Tensors of one moments shard, and the unreadable pairs by row in the shard (zeros in the tensors).

    places: of the largest latents, where pairs have several sizes; 0 otherwise.
    """
    loader = DataLoader(
        job,
        work.batch_size,
        collate_fn=list,
        num_workers=work.num_workers,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),
    )
    unreadable: dict[str, dict[str, str]] = {}
    moments: Tensor | None = None
    variants, dtype = job.spec.variants or 1, DTYPES[str(job.spec.dtype)]
    sides = max(map(job.table.count, job.indices))
    geometry = torch.zeros(len(job), variants, sides, 6, dtype=torch.int64)
    readable = torch.zeros(len(job), dtype=torch.uint8)
    place = 0
    for batch in Progress(loader, desc="images of a shard", unit=" batches", delay=3.0, mininterval=1.0, leave=False):
        sizes: dict[torch.Size, list[int]] = {}  # places in the batch of the pairs that can be read, by their size
        for i, each in enumerate(batch):
            if isinstance(each, dict):
                unreadable[str(place + i)] = each
            else:
                sizes.setdefault(each[0].shape, []).append(i)
        for good in sizes.values():
            pixels = torch.stack([batch[i][0] for i in good])  # "pair variant side 3 H W"
            with torch.no_grad():
                exact = encoder.moments(pixels.flatten(0, 2)).to("cpu")
            encoded = exact.to(dtype)
            for i in not_finite(encoded.unflatten(0, (len(good), -1)))[:1]:
                index = job.indices[place + good[i]]
                name = f"pair {job.table.ids[index]} ({job.table.where(index)})"
                raise _no_number("latents", name, bool(exact.isfinite().all()), dtype)
            if places:
                encoded = functional.pad(encoded.flatten(2), (0, places - encoded.shape[2:].numel()))
            if moments is None:
                moments = torch.zeros(len(job), variants, sides, *encoded.shape[1:], dtype=dtype)
            at, own = torch.tensor(good) + place, pixels.shape[2]
            moments[at, :, :own] = encoded.unflatten(0, (len(good), variants, own))
            geometry[at, :, :own] = torch.stack([batch[i][1] for i in good])
            readable[at] = 1
        place += len(batch)
    stored = torch.zeros(len(job), variants, sides, 1, 1, 1, dtype=dtype) if moments is None else moments
    return {"moments": stored, "geometry": geometry, "readable": readable}, unreadable


def _encode_text(encoder: Encoder, prompts: list[str], dtype: torch.dtype, batch_size: int) -> dict[str, Tensor]:
    """Tensors of one text shard."""
    embeds: list[Tensor] = []
    pooled: list[Tensor] = []
    for first in range(0, len(prompts), batch_size):
        with torch.no_grad():
            text = encoder.prompts(prompts[first : first + batch_size])
        parts = [text.prompt_embeds] if text.pooled is None else [text.prompt_embeds, text.pooled]
        for part, into in zip(parts, (embeds, pooled)):
            into.append(part.to("cpu", dtype))
            for i in not_finite(into[-1])[:1]:
                raise _no_number(
                    "embeddings", f"the prompt {prompts[first + i]!r}", bool(part[i].isfinite().all()), dtype
                )
    tensors = {"prompt_embeds": torch.cat(embeds)}
    return tensors | {"pooled": torch.cat(pooled)} if pooled else tensors


def _no_number(what: str, whose: str, fits: bool, dtype: torch.dtype) -> DataError:
    """The error for values that must not enter the cache; `fits`: they were finite before they became `dtype`."""
    kind = str(dtype).removeprefix("torch.")
    if fits:
        return DataError(
            f"the {what} of {whose} are beyond the range of cache_dtype {kind}: set data.cache_dtype to "
            "bfloat16 or float32"
        )
    remedy = OVERFLOW if what == "latents" else ("Use another base, or get its text encoders' weights again")
    return DataError(f"the {what} of {whose} are not finite and are not stored. {remedy}")
