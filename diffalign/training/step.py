"""One optimiser step. It names no algorithm: a source gives batches, an objective asks and scores, `measure` calls.

    for every micro-batch                      gradients are averaged over processes at the last one only
        probe    = objective.probe(batch), and the batch's own weights, margins and masks
        evidence = errors of reference and policy at the probe
        loss     = mean of objective.score(evidence), divided by the number of micro-batches, backpropagated
    clip, step, schedule, EMA

Nothing in a step reads a value back from the device; metrics are summed there and read when they are logged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from diffalign.engine.measure import ask_reference, measure_and_backward
from diffalign.objectives.base import ask
from diffalign.training.build import Run
from diffalign.training.metrics import Meter, observe
from diffalign.types import PairBatch, Probe


def optimizer_step(run: Run, batches: Iterator[PairBatch], meter: Meter) -> None:
    """One optimiser step: every micro-batch forward and backward, then the update."""
    accelerator, training = run.accelerator, run.config.training
    wrapped = run.networks.module

    def backward(loss: Tensor) -> None:
        run.scaler.scale(loss).backward()

    for micro, probe in enumerate(_probes(run, batches)):
        last = micro == training.gradient_accumulation_steps - 1
        with nullcontext() if last else accelerator.no_sync(wrapped):
            evidence, score = measure_and_backward(
                run.networks,
                probe,
                run.objective.score,
                scale=1 / training.gradient_accumulation_steps,
                backward=backward,
                no_sync=lambda: accelerator.no_sync(wrapped),
            )
        meter.add(observe(evidence, score, run.networks.schedule.num_train_timesteps))

    run.scaler.unscale_(run.optimizer)
    limit = math.inf if training.max_grad_norm is None else training.max_grad_norm
    all_at_once = True if accelerator.device.type == "cpu" else None  # None: torch's choice, which is so on CUDA
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, limit, foreach=all_at_once)
    taken = _update(run.optimizer, run.scaler)
    run.optimizer.zero_grad(set_to_none=True)
    if taken:
        lr = torch.tensor(run.lr_scheduler.get_last_lr()[:1], dtype=torch.float64)
        meter.add({"grad_norm": norm[None], "lr": lr})
        run.lr_scheduler.step()
        if run.ema is not None:
            run.ema.step(run.parameters)
    if run.scaler.is_enabled():
        meter.add({"skipped_steps": torch.tensor([float(not taken)])})


def _probes(run: Run, batches: Iterator[PairBatch]) -> Iterator[Probe]:
    """The points of each micro-batch of a step; with `reference_batch_size` the reference is asked at many pairs first.

    The weights do not move within a step, so all of them can be known before the first backward.
    """
    training = run.config.training

    def probe() -> Probe:
        return ask(run.objective, next(batches).to(run.accelerator.device), run.networks)

    size = (training.reference_batch_size or 0) // training.train_batch_size
    left = training.gradient_accumulation_steps
    while left:
        if size <= 1:
            yield probe()
            left -= 1
            continue
        together = [probe() for _ in range(min(size, left))]
        left -= len(together)
        yield from ask_reference(run.networks, together)


def _update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """The optimiser's update; False where fp16 gradients overflowed and the scaler skipped it."""
    if not scaler.is_enabled():
        optimizer.step()
        return True
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= scale
