"""A context without models: an encoder that hashes prompts, and a `roll` with recognisable pairs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.table.prompts import PromptTable
from diffalign.engine.random import generator
from diffalign.sources.base import Context
from diffalign.sources.rounds import Place, Records, Rollout
from diffalign.sources.stream import RoundPairs, RoundSpec

PROMPTS = [f"prompt {i}" for i in range(7)]


class HashEncoder:
    """Embeddings that say which prompt they are of; time ids as SDXL has them."""

    def prompts(self, prompts: list[str]) -> Any:
        rows = [torch.randn(3, 5, generator=generator(len(p), p)) for p in prompts]
        return SimpleNamespace(prompt_embeds=torch.stack(rows), pooled=torch.stack(rows)[:, 0])

    def time_ids(self, geometry: torch.Tensor) -> torch.Tensor:
        return geometry.float()


def toy_context(folder: Path, **changes: Any) -> Context:
    """One process, two pairs a micro-batch, two micro-batches a step; fields of the spec may be among the changes."""
    spec = {"run_seed": 3, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    spec |= {f.name: changes.pop(f.name) for f in fields(LoaderSpec) if f.name in changes}
    context = Context(
        networks=SimpleNamespace(image_forwards=0, gathered=nullcontext),
        unet=None,
        former=None,
        family=None,
        encoder=HashEncoder(),
        table=PromptTable(PROMPTS),
        spec=LoaderSpec(**spec),
        wait=lambda: None,
        folder=folder,
        saved=list,
        latent_shape=(1, 2, 2),
        resolution=8,
        device=torch.device("cpu"),
    )
    return replace(context, **changes)


def made(places: list[Place], pairs: int = 1, sides: int = 2) -> Records | None:
    """`pairs` pairs at each place, whose latents hold place and index."""
    rows = [(place.row, place.number, index) for place in places for index in range(pairs)]
    if not rows:
        return None
    prompt, number, index = torch.tensor(rows).T
    value = (number * 10 + index).float()
    return Records(
        prompt=prompt,
        place=number,
        index=index,
        latents=value[:, None, None, None].expand(sides, -1, 1, 2, 2),
        geometry=torch.full((sides, len(rows), 6), 8),
        seeds=torch.zeros(sides, len(rows), dtype=torch.int64),
        scores=torch.stack([value, -value])[:sides],
    )


def toy_source(context: Context, pairs: int = 1, **settings: Any) -> RoundPairs:
    """Rounds of five prompts with `pairs` pairs each; `rolled` counts the rounds that were made."""

    def roll(number: int, places: list[Place]) -> Rollout:
        source.rolled.append(number)
        return Rollout(made(places, pairs), {"rollout/valid": torch.ones(len(places))})

    enter = settings.pop("enter", None)
    source: Any = RoundPairs(context, RoundSpec(**{"key": "k", "prompts_per_round": 5, **settings}), roll, enter)
    source.rolled = []
    return source
