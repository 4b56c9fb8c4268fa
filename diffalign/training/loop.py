"""The training loop: steps, logs, checkpoints, validation and the final weights, until the run is at its end.

What one step does is in `training/step.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from diffalign.config.schema import save_config
from diffalign.models.adapters.save_load import load_tuned, save_tuned
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
from diffalign.training.metrics import JsonLines, Meter
from diffalign.training.optim.optimizers import effective_batch, resume_schedule
from diffalign.training.step import optimizer_step

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
                _log(run.accelerator, values, step, lines)
                _show(bar, values)
            if signum or (training.checkpointing_steps and step % training.checkpointing_steps == 0):
                written = checkpoint(run, step)
                if signum:
                    raise stopping.stopped(signum, written, step, training.max_train_steps)
            if last:
                save_final(run, step)
            if on_validation is not None and (last or step % run.config.validation.every == 0):
                with averaged_weights(run.ema, run.parameters):
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


def save_final(run: Run, step: int) -> None:
    """Writes the final weights (the EMA's where there is one) from the main process; the others wait."""
    ensure_finite(run, step)
    if run.accelerator.is_main_process:
        with averaged_weights(run.ema, run.parameters):
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
        raise diverged(run.output_dir, f"the weights are no longer finite at step {step}")


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
                "pairs_per_step": effective_batch(run.config.training, run.accelerator.num_processes),
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
    pairs = effective_batch(run.config.training, run.accelerator.num_processes)
    if state["pairs_per_step"] != pairs:
        raise CheckpointError(
            f"{folder} was written at {state['pairs_per_step']} pairs a step, this run takes {pairs}: "
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
def averaged_weights(ema: Any, parameters: Sequence[Tensor]) -> Iterator[None]:
    """The EMA weights in the policy within the block; without an EMA nothing changes."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def _log(accelerator: Accelerator, values: dict[str, float], step: int, lines: JsonLines | None) -> None:
    """Means since the last log to the file and the tracker."""
    if lines is not None:
        lines.write(step, values)
    accelerator.log(values, step=step)


def _show(bar: Any, values: dict[str, float]) -> None:
    shown = {"loss": f"{values['loss']:.4g}"}
    if "implicit_acc" in values:
        shown["acc"] = f"{values['implicit_acc']:.2f}"
    if "lr" in values:  # no step was taken where fp16 skipped all of them
        shown["lr"] = f"{values['lr']:.1e}"
    if values.get("skipped_steps"):
        shown["skipped"] = f"{values['skipped_steps']:.0%}"
    bar.set_postfix(shown)
