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
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from diffalign.engine.measure import ask_reference, measure_and_backward
from diffalign.models.policy.sharding import joined, parts
from diffalign.objectives.base import ask
from diffalign.training.metrics import Meter, observe
from diffalign.types import PairBatch, Probe

if TYPE_CHECKING:
    from diffalign.training.trainable import Run, Trainable

T = TypeVar("T")


def optimizer_step(run: Run, batches: Iterator[PairBatch], meter: Meter) -> None:
    """One optimiser step of the UNet: every micro-batch forward and backward, then the update."""
    networks, share = run.networks, 1 / run.config.training.gradient_accumulation_steps

    def backward(loss: Tensor) -> None:
        run.scaler.scale(loss).backward()

    def micro_batch(probe: Probe) -> dict[str, Tensor]:
        evidence, score = measure_and_backward(
            networks, probe, run.objective.score, scale=share, backward=backward, no_sync=run.no_sync
        )
        meter.add_margins(score.logit)
        return observe(evidence, score, networks.schedule.num_train_timesteps)

    accumulate_and_update(run, _probes(run, batches), micro_batch, meter)


def _probes(run: Run, batches: Iterator[PairBatch]) -> Iterator[Probe]:
    """The points of each micro-batch of a step; with `reference_batch_size` the reference answers many pairs at once.

    The weights do not move within a step, so the reference can answer all of them before the first backward pass.
    """
    training = run.config.training
    together = max((training.reference_batch_size or 0) // training.train_batch_size, 1)
    for first in range(0, training.gradient_accumulation_steps, together):
        number = min(together, training.gradient_accumulation_steps - first)
        probes = (_asked(run, next(batches).to(run.accelerator.device)) for _ in range(number))
        yield from probes if together == 1 else ask_reference(run.networks, list(probes))


def _asked(run: Run, batch: PairBatch) -> Probe:
    """The objective's points. Where a network determines them, processes may need it a different number of times."""
    with run.networks.gathered() if run.objective.drawn is None else nullcontext():
        return ask(run.objective, batch, run.networks)


def accumulate_and_update(
    run: Trainable, micro_batches: Iterable[T], backward: Callable[[T], dict[str, Tensor]], meter: Meter
) -> None:
    """What every kind of run shares: `backward` for each micro-batch, which returns its metrics, then the update."""
    last = run.config.training.gradient_accumulation_steps - 1
    for micro, batch in enumerate(micro_batches):
        with nullcontext() if micro == last else run.no_sync():
            meter.add(backward(batch))

    run.scaler.unscale_(run.optimizer)
    limit = run.config.training.max_grad_norm
    all_at_once = True if run.accelerator.device.type == "cpu" else None  # None: torch's choice, which is so on CUDA
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, math.inf if limit is None else limit, foreach=all_at_once)
    norm = joined(norm)
    updated = _update(run.optimizer, run.scaler)
    run.optimizer.zero_grad(set_to_none=True)
    if updated:
        lr = torch.tensor(run.lr_scheduler.get_last_lr()[:1], dtype=torch.float64)
        meter.add({"grad_norm": norm[None], "lr": lr})
        run.lr_scheduler.step()
        if run.ema is not None:
            run.ema.step(parts(run.parameters))
        if run.moving_reference is not None:
            run.moving_reference.after_update()
    if run.scaler.is_enabled():
        meter.add({"skipped_steps": torch.tensor([float(not updated)])})


def _update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """The optimiser's update; False where fp16 gradients overflowed and the scaler skipped it."""
    if not scaler.is_enabled():
        optimizer.step()
        return True
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= scale
