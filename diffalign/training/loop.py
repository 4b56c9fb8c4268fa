"""The training loop. It names no algorithm: a source gives batches, an objective asks and scores, `measure` calls.

    for every optimiser step
        for every micro-batch                      gradients are averaged over processes at the last one only
            probe    = objective.probe(batch), and the batch's own weights, margins and masks
            evidence = errors of reference and policy at the probe
            loss     = mean of objective.score(evidence), divided by the number of micro-batches, backpropagated
        clip, step, schedule, EMA

Nothing in a step reads a value back from the device; metrics are summed there and read when they are logged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from diffalign.config.schema import save_config
from diffalign.engine.measure import ask_reference, measure_and_backward
from diffalign.models.adapters.save_load import load_tuned, save_tuned
from diffalign.objectives.base import ask
from diffalign.training.build import Run
from diffalign.training.callbacks.recovery import METRICS_FILE, Guard, TrainingError, diverged
from diffalign.training.callbacks.signals import Stopping
from diffalign.training.checkpoints.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_source_state,
    load_state,
    save_checkpoint,
    set_aside,
    sweep,
    tensor_bytes,
)
from diffalign.training.checkpoints.final_weights import refuse_finished, save_final_weights
from diffalign.training.metrics import JsonLines, Meter, observe
from diffalign.training.optim.optimizers import effective_batch, resume_schedule
from diffalign.types import PairBatch, Probe

log = logging.getLogger(__name__)

OnStep = Callable[[Run, int], None]


def train(run: Run, start: int = 0, on_validation: OnStep | None = None) -> dict[str, float]:
    """Takes the remaining optimiser steps, writes checkpoints, logs and the final weights; returns the last metrics.

    `on_validation(run, step)` is called with the EMA weights in place (where there is an EMA) every
    `validation.every` steps and at the end. Raises TrainingError when the loss is not finite, and where
    `health.action` says so; it may also go back to an earlier checkpoint (`training/callbacks/recovery.py`). SIGINT
    and SIGTERM end it with a checkpoint and Interrupted (`training/callbacks/signals.py`).
    """
    training, accelerator = run.config.training, run.accelerator
    if start == training.max_train_steps:  # killed between its last checkpoint and its final weights
        save_final(run, start)
        return {}
    meter, values, guard = Meter(), {}, Guard(run, start)
    lines = JsonLines(run.output_dir / METRICS_FILE, start) if accelerator.is_main_process else None
    batches = run.source.batches(start)
    spent = Spending(training.max_unet_forwards, run)
    bar = tqdm(
        total=training.max_train_steps,
        initial=start,
        desc=run.objective.name,
        unit=" steps",
        disable=not accelerator.is_local_main_process,
    )
    step = start
    with bar, Stopping(accelerator) as stopping:
        while step < training.max_train_steps:
            step += 1
            optimizer_step(run, batches, meter)
            meter.add(run.source.take_metrics())
            bar.update()
            last = step == training.max_train_steps or spent()
            signum = 0 if last else stopping.now()
            if last or step % training.logging_steps == 0:
                values = meter.means(gather_object if accelerator.num_processes > 1 else None)
                good = guard.look(step, values)
                if good is not None:
                    accelerator.wait_for_everyone()
                    step = restore(run, good)
                    guard.went_back(step)
                    lines = JsonLines(run.output_dir / METRICS_FILE, step) if accelerator.is_main_process else None
                    batches, bar.n = run.source.batches(step), step
                    spent = Spending(training.max_unet_forwards, run)
                    continue
                values |= guard.metrics() | {"unet_forwards": unet_forwards(run)}
                _log(run, values, step, lines)
                _show(bar, values)
            if signum or (training.checkpointing_steps and step % training.checkpointing_steps == 0):
                written = checkpoint(run, step)
                if signum:
                    raise stopping.stopped(signum, written, step, training.max_train_steps)
            if last:
                save_final(run, step)
            if on_validation is not None and (last or step % run.config.validation.every == 0):
                with averaged_weights(run):
                    on_validation(run, step)
                accelerator.wait_for_everyone()
            if last:
                break
    return values


class Spending:
    """Whether one more step, at what the last one cost, would exceed a number of images through the UNets."""

    def __init__(self, limit: int | None, run: Run) -> None:
        """None: no limit, and nothing is counted."""
        self.limit, self.run = limit, run
        self.before = 0 if limit is None else unet_forwards(run)

    def __call__(self) -> bool:
        """Asks all processes, so that they end at the same step."""
        if self.limit is None:
            return False
        total = unet_forwards(self.run)
        cost, self.before = total - self.before, total
        return total + cost > self.limit


def unet_forwards(run: Run) -> int:
    """Images through policy and reference since the run began, over all processes: inversions, samples, both sides."""
    own = run.networks.image_forwards
    return sum(gather_object([own])) if run.accelerator.num_processes > 1 else own


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
    taken = _update(run)
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


def _update(run: Run) -> bool:
    """The optimiser's update; False where fp16 gradients overflowed and the scaler skipped it."""
    if not run.scaler.is_enabled():
        run.optimizer.step()
        return True
    scale = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return run.scaler.get_scale() >= scale


def save_final(run: Run, step: int) -> None:
    """Writes the final weights (the EMA's where there is one) from the main process; the others wait."""
    ensure_finite(run, step)
    if run.accelerator.is_main_process:
        with averaged_weights(run):
            save_final_weights(
                run.output_dir,
                step,
                lambda folder: save_tuned(run.unet, folder, run.base.family),
                tensor_bytes(run.parameters),
            )
    run.accelerator.wait_for_everyone()


def ensure_finite(run: Run, step: int) -> None:
    """Raises TrainingError when a trained weight is not finite, so that nothing broken is written or rotates out
    what is whole."""
    norms = torch.stack(torch._foreach_norm([p.detach() for p in run.parameters]))
    if not bool(norms.isfinite().all()):
        raise diverged(run, f"the weights are no longer finite at step {step}")


def checkpoint(run: Run, step: int) -> Path:
    """Writes checkpoint-`step` from the main process; the others wait. Returns its folder."""
    ensure_finite(run, step)
    forwards = unet_forwards(run)
    if run.accelerator.is_main_process:
        save_checkpoint(
            run.output_dir,
            step,
            lambda folder: _write(run, folder),
            {
                "optimizer": run.optimizer.state_dict(),
                "lr_scheduler": run.lr_scheduler.state_dict(),
                "scaler": run.scaler.state_dict(),
                "ema": None if run.ema is None else run.ema.state_dict(),
                "pairs_per_step": _pairs_per_step(run),
                "unet_forwards": forwards,
                "max_train_steps": run.config.training.max_train_steps,
            },
            run.config.training.checkpoints_total_limit,
            run.source.state_dict(),
            identity=run.identity,
            weights_bytes=tensor_bytes(run.parameters),
        )
    run.accelerator.wait_for_everyone()
    return run.output_dir / f"checkpoint-{step}"


def _write(run: Run, folder: Path) -> None:
    """The weights, and the settings they were trained with."""
    save_tuned(run.unet, folder, run.base.family)
    save_config(run.config, folder / "config.yaml")


def resume(run: Run) -> int:
    """Restores the configured checkpoint, if any, and returns the number of steps already taken."""
    wanted = run.config.training.resume_from_checkpoint
    if run.accelerator.is_main_process:
        sweep(run.output_dir)
    run.accelerator.wait_for_everyone()
    folder = None if wanted is None else find_checkpoint(run.output_dir, wanted)
    if folder is None:
        if wanted is None:
            return 0
        if not run.config.overwrite_output_dir:
            refuse_finished(run.output_dir)
        log.info("resume_from_checkpoint: latest, and no checkpoint yet in %s: starting at step 0", run.output_dir)
        return 0
    return restore(run, folder)


def restore(run: Run, folder: Path) -> int:
    """The run as it was when it wrote a checkpoint; later ones are set aside. Returns the steps taken by then."""
    load_tuned(run.unet, folder)
    state = load_state(folder)
    if state["step"] > run.config.training.max_train_steps:
        raise CheckpointError(
            f"{folder} is at step {state['step']}, past training.max_train_steps = "
            f"{run.config.training.max_train_steps}: raise that, or name an earlier checkpoint"
        )
    if state["pairs_per_step"] != _pairs_per_step(run):
        raise CheckpointError(
            f"{folder} was written at {state['pairs_per_step']} pairs a step, this run takes {_pairs_per_step(run)}: "
            "keep the product of train_batch_size, gradient_accumulation_steps and processes, or pairs would be "
            "skipped or seen twice"
        )
    resume_schedule(run, state)
    run.scaler.load_state_dict(state["scaler"])
    if (run.ema is None) != (state["ema"] is None):
        raise TrainingError(
            f"{folder} was written {'with' if run.ema is None else 'without'} EMA: set ema_decay as then"
        )
    if run.ema is not None:
        run.ema.load_state_dict(state["ema"])
        run.ema.to(run.accelerator.device)
    run.source.load_state_dict(load_source_state(folder))
    run.networks.image_forwards = state["unet_forwards"] if run.accelerator.is_main_process else 0
    log.info("resumed from %s", folder)
    if run.accelerator.is_main_process:
        set_aside(run.output_dir, int(state["step"]))
    run.accelerator.wait_for_everyone()
    return int(state["step"])


@contextmanager
def averaged_weights(run: Run) -> Iterator[None]:
    """The EMA weights in the policy within the block; without an EMA nothing changes."""
    if run.ema is None:
        yield
        return
    run.ema.store(run.parameters)
    run.ema.copy_to(run.parameters)
    try:
        yield
    finally:
        run.ema.restore(run.parameters)


def _log(run: Run, values: dict[str, float], step: int, lines: JsonLines | None) -> None:
    """Means since the last log to the file and the tracker."""
    if lines is not None:
        lines.write(step, values)
    run.accelerator.log(values, step=step)


def _pairs_per_step(run: Run) -> int:
    return effective_batch(run.config.training, run.accelerator.num_processes)


def _show(bar: Any, values: dict[str, float]) -> None:
    shown = {"loss": f"{values['loss']:.4g}"}
    if "implicit_acc" in values:
        shown["acc"] = f"{values['implicit_acc']:.2f}"
    if "lr" in values:  # no step was taken where fp16 skipped all of them
        shown["lr"] = f"{values['lr']:.1e}"
    if values.get("skipped_steps"):
        shown["skipped"] = f"{values['skipped_steps']:.0%}"
    bar.set_postfix(shown)
