"""One optimiser step of a step-aware preference model (SPO, arXiv 2406.04314).

    for every micro-batch                      gradients are averaged over processes at the last one only
        images, t  = x̂_0 of both sides at one noise level, decoded
        scores     = exp(logit_scale) · cos(image, prompt), with t as an input
        loss       = Σ weight · (cross-entropy of the two scores against the label), backpropagated
    clip, step, schedule

The second half is `training/step.py`'s; nothing of a diffusion loss is in the first: no probe, no reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffalign.contrib.step_aware.batch import decoded_predictions
from diffalign.contrib.step_aware.clip import step_aware_pixels
from diffalign.contrib.step_aware.loss import preference_loss
from diffalign.training.metrics import QUARTERS, Meter
from diffalign.training.step import accumulate_and_update
from diffalign.types import PairBatch

if TYPE_CHECKING:
    from diffalign.contrib.step_aware.build import PreferenceRun


def judge_step(run: PreferenceRun, batches: Iterator[PairBatch], meter: Meter) -> None:
    """Every micro-batch forward and backward, then the update. The weights of a step's batches sum to 1."""
    accelerator = run.accelerator

    def micro_batch(batch: PairBatch) -> dict[str, Tensor]:
        scores, labels, t = run.scores(batch)
        loss = preference_loss(scores, labels.to(accelerator.device, non_blocking=True))
        weight = batch.terms.weight
        assert weight is not None, "`WeightedPairs` sets it"
        (accelerator.num_processes * (weight * loss).sum()).backward()  # DDP averages over processes
        shares = loss.detach() * weight * run.pairs_per_step
        return judge_metrics(scores.detach(), labels, shares, t, run.networks.schedule.num_train_timesteps)

    own = islice(batches, run.config.training.gradient_accumulation_steps)
    accumulate_and_update(run, (batch.to(accelerator.device) for batch in own), micro_batch, meter)


def scores_of(run: PreferenceRun, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Scores "side pair" of a batch's decoded x̂_0, with grad; on the CPU their labels and timesteps [pair]."""
    device = run.accelerator.device
    assert run.base.vae is not None, "this run unloads nothing"
    images, t = decoded_predictions(batch, run.networks, run.base.vae, run.config.preference_model.guidance_scale)
    pixels = step_aware_pixels(images.flatten(0, 1), run.model.config.vision_config.image_size)
    tokens = run.tokenizer(
        run.labels.prompts(batch.ids),
        padding="max_length",
        truncation=True,
        max_length=run.model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    ).to(device)
    dtype = run.networks.autocast_dtype
    with nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype):
        vectors, texts, scale = run.module(
            pixels, t.expand(2, -1).flatten().to(device), tokens.input_ids, tokens.attention_mask
        )
    cosine = (vectors.unflatten(0, (2, -1)) * texts).sum(-1)
    return scale * cosine, run.labels(batch.ids), t


def judge_metrics(scores: Tensor, labels: Tensor, loss: Tensor, t: Tensor, timesteps: int) -> dict[str, Tensor]:
    """Values of one micro-batch by metric name; each tensor is averaged over its entries.

    `loss` is weighted, so that its mean is the step's; accuracies are over pairs with a preference, `accuracy/q1` over
    those of the quarter of timesteps with the least noise. Labels and t are on the CPU: nothing waits for the device.
    """
    decided = labels[0] != labels[1]
    margin = (scores[0] - scores[1]) * (labels[0] - labels[1]).to(scores.device, non_blocking=True)
    values = {"loss": loss, "ties": (~decided).float()}
    quarter = t * QUARTERS // timesteps
    groups = {"": decided} | {f"/q{q + 1}": decided & (quarter == q) for q in range(QUARTERS)}
    for name, members in groups.items():
        index = members.nonzero().flatten()
        if len(index):
            of_group = margin[index.to(scores.device, non_blocking=True)]
            values[f"accuracy{name}"] = (of_group > 0).float()
            if not name:
                values["margin"] = of_group
    return values
