"""Training a step-aware preference model (SPO, arXiv 2406.04314): `diffalign train` with a `preference_model` section.

    for every optimiser step
        for every micro-batch                      gradients are averaged over processes at the last one only
            pictures, t  = x̂_0 of both images at one noise level, decoded
            scores       = exp(logit_scale) · cos(picture, prompt), told t
            loss         = Σ weight · (cross-entropy of the two scores against the label)
        clip, step, schedule

A loop of its own, because nothing of a diffusion loss is left in it: no probe, no reference, another network.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from diffalign.config.schema import PreferenceModelConfig, save_config
from diffalign.rewards.clip import load_state as load_weights
from diffalign.rewards.preference_loss import preference_loss
from diffalign.rewards.step_aware import WEIGHTS_FILE, WEIGHTS_FOLDER, save_step_aware
from diffalign.rewards.step_aware_clip import step_aware_pixels
from diffalign.training.callbacks.recovery import TrainingError
from diffalign.training.callbacks.signals import Stopping
from diffalign.training.checkpoints.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_state,
    save_checkpoint,
    set_aside,
    sweep,
    tensor_bytes,
)
from diffalign.training.checkpoints.final_weights import refuse_finished, save_final_weights
from diffalign.training.metrics import QUARTERS, JsonLines, Meter
from diffalign.training.optim.optimizers import resume_schedule
from diffalign.training.preference_model.batch import half_made
from diffalign.training.preference_model.setup import (
    PreferenceRun,
    build_preference_run,
    describe,
    open_pairs_of,
    with_one_pair,
)
from diffalign.training.processes import make_accelerator
from diffalign.training.remedies import with_remedies
from diffalign.training.run import begin, own_folder, report_rows
from diffalign.training.settle import with_precision
from diffalign.types import PairBatch

log = logging.getLogger(__name__)


def run_preference_training(config: PreferenceModelConfig) -> dict[str, float]:
    """Runs a config to its end and returns the last logged metrics.

    Raises what `run_training` raises, and ScorerError when the CLIP to start from is not there.
    """
    accelerator = make_accelerator(config)
    config = with_precision(config, accelerator.device)
    with own_folder(config, accelerator):
        return _run(config, accelerator)


def _run(config: PreferenceModelConfig, accelerator: Accelerator) -> dict[str, float]:
    output_dir = Path(config.output_dir)
    table = open_pairs_of(config, accelerator)
    if accelerator.is_main_process:
        report_rows(table, config.data.path)
    run = build_preference_run(config, accelerator, table)
    start = resume(run)
    begin(run.config, accelerator, start, lambda: describe(run, start))
    values = train(run, start)
    if accelerator.is_main_process:
        print(f"weights in {output_dir / WEIGHTS_FOLDER}: the scorer step-aware={output_dir}")
    return values


def check_preference_run(config: PreferenceModelConfig, accelerator: Accelerator) -> str:
    """Builds a run, takes one optimiser step of one pair, and returns its plan and measurements; writes nothing."""
    with with_remedies(config):
        run = build_preference_run(config, accelerator)
        small, meter = with_one_pair(run), Meter()
        optimizer_step(small, 1, small.source.batches(0), meter)
        values = meter.means()
    step = f"1 pair: loss {values['loss']:.6f}, gradient norm {values['grad_norm']:.4g}"
    return f"{describe(run)}\n{'dry run':>14}  {step}"


def train(run: PreferenceRun, start: int = 0) -> dict[str, float]:
    """Takes the remaining optimiser steps, writes checkpoints, logs and the final weights; returns the last metrics.

    Raises TrainingError when the loss or a weight is not finite. SIGINT and SIGTERM end it with a checkpoint and
    Interrupted.
    """
    training, accelerator = run.config.training, run.accelerator
    meter, values = Meter(), {}
    lines = JsonLines(run.output_dir / "metrics.jsonl", start) if accelerator.is_main_process else None
    batches = run.source.batches(start)
    bar = tqdm(
        total=training.max_train_steps,
        initial=start,
        desc="preference model",
        unit=" steps",
        disable=not accelerator.is_local_main_process,
    )
    with bar, Stopping(accelerator) as stopping:
        for step in range(start + 1, training.max_train_steps + 1):
            optimizer_step(run, step, batches, meter)
            bar.update()
            if step == training.max_train_steps or step % training.logging_steps == 0:
                values = _log(run.accelerator, meter, step, lines)
                bar.set_postfix({name: f"{values[name]:.3g}" for name in ("loss", "accuracy", "lr") if name in values})
            signum = 0 if step == training.max_train_steps else stopping.now()
            if signum or (training.checkpointing_steps and step % training.checkpointing_steps == 0):
                checkpoint(run, step)
            if signum:
                written = run.output_dir / f"checkpoint-{step}"
                raise stopping.stopped(signum, written, step, training.max_train_steps)
    _ensure_finite(run.parameters)
    if accelerator.is_main_process:
        save_final_weights(
            run.output_dir,
            training.max_train_steps,
            lambda folder: save_step_aware(run.model, run.tokenizer, folder / WEIGHTS_FOLDER),
            tensor_bytes(run.parameters),
        )
    accelerator.wait_for_everyone()
    return values


def optimizer_step(run: PreferenceRun, step: int, batches: Iterator[PairBatch], meter: Meter) -> None:
    """Optimiser step number `step`, from 1 on: every micro-batch forward and backward, then the update."""
    training, accelerator = run.config.training, run.accelerator
    processes = accelerator.num_processes
    micro_batches = training.gradient_accumulation_steps
    weights = run.weights(step - 1, training.train_batch_size, micro_batches, accelerator.process_index, processes)
    for micro in range(micro_batches):
        batch = next(batches).to(accelerator.device)
        with nullcontext() if micro == micro_batches - 1 else accelerator.no_sync(run.module):
            weight = weights[micro].to(accelerator.device, non_blocking=True)
            scores, labels, t = judge(run, batch)
            loss = preference_loss(scores, labels.to(accelerator.device, non_blocking=True))
            (processes * (weight * loss).sum()).backward()  # DDP averages over processes; weights sum to 1 over all
        shares = loss.detach() * weight * run.weights.pairs
        meter.add(observe(scores.detach(), labels, shares, t, run.networks.schedule.num_train_timesteps))
    limit = math.inf if training.max_grad_norm is None else training.max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, limit)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    meter.add({"grad_norm": norm[None], "lr": torch.tensor(run.lr_scheduler.get_last_lr()[:1], dtype=torch.float64)})
    run.lr_scheduler.step()


def judge(run: PreferenceRun, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Scores "side pair" of a batch's half-made pictures, with grad; on the CPU their labels and timesteps [pair]."""
    device = run.accelerator.device
    assert run.base.vae is not None, "this run unloads nothing"
    pictures, t = half_made(batch, run.networks, run.base.vae, run.config.preference_model.guidance_scale)
    pixels = step_aware_pixels(pictures.flatten(0, 1), run.model.config.vision_config.image_size)
    tokens = run.tokenizer(
        run.labels.prompts(batch.ids),
        padding="max_length",
        truncation=True,
        max_length=run.model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    ).to(device)
    dtype = run.networks.autocast_dtype
    with nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype):
        images, texts, scale = run.module(
            pixels, t.expand(2, -1).flatten().to(device), tokens.input_ids, tokens.attention_mask
        )
    cosine = (images.unflatten(0, (2, -1)) * texts).sum(-1)
    return scale * cosine, run.labels(batch.ids), t


def observe(scores: Tensor, labels: Tensor, loss: Tensor, t: Tensor, timesteps: int) -> dict[str, Tensor]:
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


def checkpoint(run: PreferenceRun, step: int) -> None:
    """Writes checkpoint-`step` from the main process; the others wait."""
    _ensure_finite(run.parameters)
    if run.accelerator.is_main_process:

        def write(folder: Path) -> None:
            save_step_aware(run.model, run.tokenizer, folder / WEIGHTS_FOLDER)
            save_config(run.config, folder / "config.yaml")

        state: dict[str, Any] = {
            "optimizer": run.optimizer.state_dict(),
            "lr_scheduler": run.lr_scheduler.state_dict(),
            "pairs_per_step": run.weights.pairs,
            "max_train_steps": run.config.training.max_train_steps,
        }
        save_checkpoint(
            run.output_dir,
            step,
            write,
            state,
            run.config.training.checkpoints_total_limit,
            identity=run.identity,
            weights_bytes=tensor_bytes(run.parameters),
        )
    run.accelerator.wait_for_everyone()


def resume(run: PreferenceRun) -> int:
    """Restores the configured checkpoint, if any, and returns the number of steps already taken."""
    config = run.config
    wanted = config.training.resume_from_checkpoint
    if run.accelerator.is_main_process:
        sweep(run.output_dir)
    run.accelerator.wait_for_everyone()
    folder = None if wanted is None else find_checkpoint(run.output_dir, wanted)
    if folder is None:
        if wanted is not None and not config.overwrite_output_dir:
            refuse_finished(run.output_dir)
        return 0
    state = load_state(folder)
    if state["step"] > config.training.max_train_steps:
        raise CheckpointError(
            f"{folder} is at step {state['step']}, past training.max_train_steps = "
            f"{config.training.max_train_steps}: raise that, or name an earlier checkpoint"
        )
    if state["pairs_per_step"] != run.weights.pairs:
        raise CheckpointError(
            f"{folder} was written at {state['pairs_per_step']} pairs a step, this run takes {run.weights.pairs}: keep "
            "the product of train_batch_size, gradient_accumulation_steps and processes, or pairs would be skipped"
        )
    run.model.load_state_dict(load_weights(folder / WEIGHTS_FOLDER / WEIGHTS_FILE))
    resume_schedule(run, state)
    log.info("resumed from %s", folder)
    if run.accelerator.is_main_process:
        set_aside(run.output_dir, int(state["step"]))
    run.accelerator.wait_for_everyone()
    return int(state["step"])


def _log(accelerator: Accelerator, meter: Meter, step: int, lines: JsonLines | None) -> dict[str, float]:
    """Means since the last log, over all processes, to the file and the tracker."""
    values = meter.means(gather_object if accelerator.num_processes > 1 else None)
    if not math.isfinite(values["loss"]):
        raise TrainingError(f"the loss is {values['loss']} at step {step}: lower training.learning_rate")
    if lines is not None:
        lines.write(step, values)
    accelerator.log(values, step=step)
    return values


def _ensure_finite(parameters: Sequence[Tensor]) -> None:
    """Raises TrainingError when a trained weight is not finite, so that nothing broken is written."""
    norms = torch.stack(torch._foreach_norm([p.detach() for p in parameters]))
    if not bool(norms.isfinite().all()):
        raise TrainingError("a weight is no longer finite: lower training.learning_rate")
