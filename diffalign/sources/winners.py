"""Pairs of a winner, read and encoded, and an image that the reference makes from its prompt."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from diffalign.data.finite import require_latents
from diffalign.data.loader.loaded import sample_latents as draw_latents
from diffalign.data.row import ImageError
from diffalign.data.transforms import prepare_images
from diffalign.engine.random import pair_key
from diffalign.sources.base import Context
from diffalign.sources.rounds import NO_SEED, Place, Records, Rollout
from diffalign.sources.sampling import LatentSampling, Text, sample_latents, sampled_geometry

if TYPE_CHECKING:
    from diffalign.data.table.winners import Winners

log = logging.getLogger(__name__)


def against_winners(
    context: Context,
    text: Text,
    places: list[Place],
    sampling: LatentSampling,
) -> Rollout:
    """One pair for each place whose winner can be read; the others are named in the log and counted."""
    usable, latents, geometry = _winners(context, places, sampling.batch_size)
    valid = torch.zeros(len(places))
    valid[: len(usable)] = 1.0
    metrics = {"rollout/valid": valid}
    if not usable:
        return Rollout(None, metrics)
    seeds = [place.seed(context.spec.run_seed, 0) for place in usable]
    prompts = [place.prompt for place in usable]
    made = sample_latents(context, text, context.networks.reference, prompts, seeds, sampling)
    own = torch.tensor(seeds, dtype=torch.int64)
    records = Records(
        prompt=torch.tensor([place.row for place in usable]),
        place=torch.tensor([place.number for place in usable]),
        index=torch.zeros(len(usable), dtype=torch.int64),
        latents=torch.stack([latents, made]),
        geometry=torch.stack([geometry, sampled_geometry(context.resolution, len(usable))]),
        seeds=torch.stack([torch.full_like(own, NO_SEED), own]),
    )
    return Rollout(records, metrics)


def _winners(context: Context, places: list[Place], batch_size: int) -> tuple[list[Place], Tensor, Tensor]:
    """The places whose image can be read, with their latents "n c h w" and geometry int64 "n 6"."""
    table = cast("Winners", context.table)
    usable, found, boxes = [], [], []
    for start in range(0, len(places), batch_size):
        pixels, keys = [], []
        for place in places[start : start + batch_size]:
            key = pair_key(context.spec.run_seed, place.id, place.number)
            try:
                image, box = prepare_images(
                    [table.chosen(place.row)],
                    (context.resolution, context.resolution),
                    key=key,
                    center_crop=context.center_crop,
                    random_flip=context.random_flip,
                )
            except ImageError as error:
                log.warning("left out of this iteration: %s: %s", table.where(place.row), error)
                continue
            usable.append(place)
            pixels.append(image)
            keys.append(key)
            boxes.append(box)
        if pixels:
            moments = context.encoder.moments(torch.cat(pixels)).cpu()
            require_latents(moments, [table.where(place.row) for place in usable[-len(pixels) :]])
            found.append(draw_latents(moments[None], torch.tensor(keys))[0])
    empty = torch.empty(0, *context.latent_shape)
    return usable, torch.cat(found) if found else empty, torch.cat(boxes) if boxes else torch.empty(0, 6)
