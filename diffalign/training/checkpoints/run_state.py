"""A run into a checkpoint and back, and its final weights; the same for every kind of run.

The main process writes and the others wait. Nothing is written while a trained weight is not finite.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.config.schema import save_config
from diffalign.models.policy.sharding import joined
from diffalign.training.build_source import SOURCE_FOLDER
from diffalign.training.checkpoints.background import at_once
from diffalign.training.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoints,
    find_checkpoint,
    load_source_state,
    load_training_state,
    remove_partial,
    save_checkpoint,
    set_aside,
    tensor_bytes,
)
from diffalign.training.checkpoints.final_weights import refuse_finished, save_final_weights
from diffalign.training.distributed.sharded_state import SHARDS, put_back, save_shards, trained_state
from diffalign.training.optim.optimizers import resume_schedule
from diffalign.training.processes import on_main
from diffalign.training.trainable import Trainable, TrainingError

log = logging.getLogger(__name__)

CallbackStates = Callable[[Path], dict[str, dict[str, Any]]]


def _no_states(folder: Path) -> dict[str, dict[str, Any]]:
    return {}


def save_run(run: Trainable, step: int, callback_states: CallbackStates = _no_states) -> Path:
    """Writes checkpoint-`step` and returns its folder. Raises TrainingError for weights that are not finite.

    With `training.async_checkpoints` the folder is there after `finish_saving`.

    callback_states: writes the callbacks' files into a folder and returns their states by name.
    """
    ensure_finite(run.parameters, run.output_dir, step)
    training, forwards = run.config.training, run.unet_forwards()
    finish_saving(run)

    states: dict[str, dict[str, Any]] = {}

    trained, shards = trained_state(run)
    sharded = save_shards(run, step, shards)

    def save_weights(folder: Path) -> None:
        run.save_weights(folder)
        save_config(run.config, folder / "config.yaml")
        states.update(callback_states(folder))
        if sharded is not None:
            sharded.rename(folder / SHARDS)

    with run.ready_to_save():
        if run.accelerator.is_main_process:
            state = {
                "optimizer": trained["optimizer"],
                "lr_scheduler": run.lr_scheduler.state_dict(),
                "scaler": run.scaler.state_dict(),
                "ema": trained["ema"],
                "reference": None if run.moving_reference is None else run.moving_reference.state_dict(),
                "pairs_per_step": run.pairs_per_step,
                "unet_forwards": forwards,
                "max_train_steps": training.max_train_steps,
                "callbacks": states,  # filled while the weights are written
            }
            content = Checkpoint(
                step, save_weights, state, run.source.state_dict(), run.identity, tensor_bytes(run.parameters)
            )
            finish = run.background.begin if training.async_checkpoints else at_once
            save_checkpoint(run.output_dir, content, training.checkpoints_total_limit, finish)
    run.accelerator.wait_for_everyone()
    return run.output_dir / f"checkpoint-{step}"


def finish_saving(run: Trainable) -> None:
    """Returns when the last checkpoint is complete. Every process calls it; raises what stopped the writing."""
    if run.config.training.async_checkpoints:
        run.background.wait()
        run.accelerator.wait_for_everyone()


def save_final(run: Trainable, step: int) -> None:
    """Writes the final weights, the EMA's where there is one. Raises TrainingError for weights that are not finite."""
    ensure_finite(run.parameters, run.output_dir, step)
    finish_saving(run)
    with run.averaged_weights(), run.ready_to_save():
        if run.accelerator.is_main_process:
            save_final_weights(run.output_dir, step, run.save_weights, tensor_bytes(run.parameters))
    run.accelerator.wait_for_everyone()


def resume(run: Trainable) -> int:
    """Restores the configured checkpoint, if any, and returns the number of steps already taken.

    Raises CheckpointError for a checkpoint that is missing, damaged or does not fit the run.
    """
    wanted = run.config.training.resume_from_checkpoint
    if run.accelerator.is_main_process:
        for place in (run.output_dir, *(run.output_dir / SOURCE_FOLDER).glob("*/")):
            remove_partial(place)
    run.accelerator.wait_for_everyone()
    if wanted is None:
        return 0
    folder = on_main(run.accelerator, lambda: find_checkpoint(run.output_dir, wanted))  # others may list files late
    if folder is not None:
        return restore(run, folder)
    if not run.config.overwrite_output_dir:
        refuse_finished(run.output_dir)
    log.info("resume_from_checkpoint: latest, and no checkpoint yet in %s: starting at step 0", run.output_dir)
    return 0


def restore(run: Trainable, folder: Path) -> int:
    """The run as it was when it wrote a checkpoint; later ones are set aside. Returns the steps taken by then."""
    finish_saving(run)
    state, training = load_training_state(folder), run.config.training
    step, pairs, ema = int(state["step"]), state["pairs_per_step"], state.get("ema")
    if step > training.max_train_steps:
        raise CheckpointError(
            f"{folder} is at step {step}, past training.max_train_steps = {training.max_train_steps}: raise that, or "
            "name an earlier checkpoint"
        )
    if pairs != run.pairs_per_step:
        raise CheckpointError(
            f"{folder} was written at {pairs} pairs a step, this run takes {run.pairs_per_step}: "
            "keep the product of train_batch_size, gradient_accumulation_steps and processes, or pairs would be "
            "skipped or seen twice"
        )
    if (run.ema is None) != (ema is None):
        written = "with" if run.ema is None else "without"
        raise TrainingError(f"{folder} was written {written} EMA: set training.ema_decay as it was then")
    run.load_weights(folder)
    state = put_back(run, folder, state)
    ema = state.get("ema")
    resume_schedule(run, state)
    run.scaler.load_state_dict(state.get("scaler", {}))
    if run.ema is not None:
        run.ema.load_state_dict(ema)
        run.ema.to(run.accelerator.device)
    if run.moving_reference is not None:
        if state.get("reference") is None:
            raise TrainingError(
                f"{folder} has no reference that follows the policy; unset training.ref_model_sync_steps"
            )
        run.moving_reference.load_state_dict(state["reference"])
    run.source.load_state_dict(load_source_state(folder))
    run.callback_states, run.restored_from = state.get("callbacks", {}), folder
    run.networks.image_forwards = state.get("unet_forwards", 0) if run.accelerator.is_main_process else 0
    log.info("resumed from %s", folder)
    if run.accelerator.is_main_process:
        set_aside(run.output_dir, step)
    run.accelerator.wait_for_everyone()
    return step


def ensure_finite(parameters: Sequence[Tensor], output_dir: Path, step: int) -> None:
    """Raises TrainingError where a trained weight is not finite: broken weights must not replace good ones."""
    norms = joined(torch.stack(torch._foreach_norm([p.detach() for p in parameters])))
    if not bool(norms.isfinite().all()):
        raise diverged(output_dir, f"the weights are no longer finite at step {step}")


def diverged(output_dir: Path, what: str) -> TrainingError:
    """The error for a run whose loss or weights are not finite."""
    there = checkpoints(output_dir)
    last = f"resume from {there[-1].name}" if there else "start again"
    return TrainingError(f"{what}: lower training.learning_rate, or train in bf16 or fp32 instead of fp16, then {last}")
