"""Optimisers and learning-rate schedules by name. Both are libraries' own; what is ours is the choice of settings."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LRScheduler

from diffalign.config.sections import TrainingSection
from diffalign.errors import DiffalignError, MissingPackageError
from diffalign.training.optim.eight_bit import EightBitAdamW
from diffalign.training.optim.stochastic_rounding import StochasticAdamW

log = logging.getLogger(__name__)

FUSED = ("cuda", "cpu")  # devices with one kernel for the whole of Adam's update


def make_optimizer(
    parameters: Iterable[Parameter], training: TrainingSection, lr: float, seed: int = 0
) -> torch.optim.Optimizer:
    """The configured optimiser at learning rate `lr`.

    adamw             torch's, fused where the parameters' device has it
    adamw_8bit        torchao's AdamW with 8-bit state (extra `8bit`, CUDA)
    adamw_bf16        AdamW with stochastic rounding, for weights that are bfloat16 (`stochastic_rounding.py`, seeded)
    adamw_8bit_bf16   the same with moments of 8 bits (`eight_bit.py`)
    adafactor         without scaled parameters or relative steps, as Diffusion-DPO's SDXL launcher uses it

    Raises ImportError saying what to install, and ValueError where the device cannot run it.
    """
    params = list(parameters)
    betas = (training.adam_beta1, training.adam_beta2)
    shared: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": training.adam_weight_decay}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(params, **shared, eps=training.adam_epsilon, fused=params[0].device.type in FUSED)
    if training.bf16_weights:
        make = StochasticAdamW if training.optimizer == "adamw_bf16" else EightBitAdamW
        return make(params, **shared, eps=training.adam_epsilon, seed=seed)
    if training.optimizer == "adamw_8bit":
        if not params[0].is_cuda:
            raise DiffalignError("training.optimizer: adamw_8bit needs a CUDA device; use adamw or adafactor here")
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise MissingPackageError(
                "training.optimizer: adamw_8bit needs torchao; install it with pip install 'diffalign[8bit]'"
            ) from None
        return AdamW8bit(params, **shared, eps=training.adam_epsilon)
    from transformers.optimization import Adafactor

    return Adafactor(params, lr=lr, weight_decay=training.adam_weight_decay, scale_parameter=False, relative_step=False)


def make_lr_scheduler(optimizer: torch.optim.Optimizer, training: TrainingSection) -> LRScheduler:
    """The configured schedule, stepped once an optimiser step; warm-up rises linearly from 0."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        training.lr_scheduler,
        optimizer,
        num_warmup_steps=training.lr_warmup_steps,
        num_training_steps=training.max_train_steps,
    )


def set_rates(optimizer: torch.optim.Optimizer, scheduler: Any, peaks: list[float] | None = None) -> None:
    """Sets every group's learning rate to what the schedule has for it where it stands now.

    peaks: the rate that each group's schedule is a multiple of; None: as they are.
    """
    for i, group in enumerate(optimizer.param_groups):
        peak = scheduler.base_lrs[i] if peaks is None else peaks[i]
        now = peak * scheduler.lr_lambdas[i](scheduler.last_epoch)
        scheduler.base_lrs[i] = group["initial_lr"] = peak
        if isinstance(group["lr"], torch.Tensor):  # torchao's 8-bit AdamW
            group["lr"].fill_(now)
        else:
            group["lr"] = now
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def resume_schedule(run: Any, state: dict[str, Any]) -> None:
    """Optimiser and schedule as a checkpoint has them; a run of another length goes on along its own schedule.

    The schedule determines the rate of every step of a run of `max_train_steps`. After a change of that number, the
    checkpoint's rate of the next step is the old schedule's: the new one's replaces it, with a warning in the log.
    """
    training = run.config.training
    run.optimizer.load_state_dict(state["optimizer"])
    run.lr_scheduler.load_state_dict(state["lr_scheduler"])
    before = float(run.optimizer.param_groups[0]["lr"])
    set_rates(run.optimizer, run.lr_scheduler)
    after = float(run.optimizer.param_groups[0]["lr"])
    if before != after:
        was = state.get("max_train_steps", "another number of")
        log.warning(
            "training.max_train_steps is %d and was %s: lr_scheduler %s goes on as in a run of %d steps from its "
            "beginning, so step %d has the learning rate %.4g (%.4g before)",
            *(training.max_train_steps, was, training.lr_scheduler, training.max_train_steps),
            *(state["step"] + 1, after, before),
        )


def effective_lr(training: TrainingSection, processes: int) -> float:
    """The learning rate in force: with `scale_lr` the configured one times the effective batch in pairs."""
    return training.learning_rate * (effective_batch(training, processes) if training.scale_lr else 1)


def effective_batch(training: TrainingSection, processes: int) -> int:
    """Pairs in one optimiser step over all processes."""
    return training.train_batch_size * training.gradient_accumulation_steps * processes
