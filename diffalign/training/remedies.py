"""Errors of a machine that is too small for a run, with the run's own settings and what to change in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffalign.config.schema import Config, PreferenceModelConfig
from diffalign.errors import DiffalignError, lost_worker, out_of_memory


class ResourceError(DiffalignError):
    """The machine has too little memory for the settings."""


@contextmanager
def with_remedies(config: Config | PreferenceModelConfig) -> Iterator[None]:
    """Raises ResourceError, which names what to change, where memory runs out or a loader worker is killed within."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (cause := out_of_memory(error)) is not None:
            raise ResourceError(f"{cause}. {_counted(config, error) or _smaller(config)}") from error
        if (cause := lost_worker(error)) is not None:
            now = config.data.dataloader_num_workers
            raise ResourceError(
                f"{cause}. Lower data.dataloader_num_workers (now {now}; 0 loads in the main process), or give the "
                "machine more memory; in a container, more shared memory (docker run --shm-size=8g)"
            ) from error
        raise


def _counted(config: Config | PreferenceModelConfig, error: BaseException) -> str | None:
    """What the run holds and what would save most, as numbers; None where they are not known."""
    if not isinstance(config, Config):
        return None
    from diffalign.training.inspect.memory_advice import memory_advice

    return memory_advice(config, torch.device("cuda" if isinstance(error, torch.OutOfMemoryError) else "cpu"))


def _smaller(config: Config | PreferenceModelConfig) -> str:
    """The settings that could be smaller, with their values."""
    training, hints = config.training, []
    if training.train_batch_size > 1:
        hints.append(
            f"lower training.train_batch_size (now {training.train_batch_size}; more "
            "training.gradient_accumulation_steps leave the result as it is)"
        )
    if isinstance(config, Config) and config.model.gradient_checkpointing != "full":
        hints.append(f"set model.gradient_checkpointing: full (now {config.model.gradient_checkpointing})")
    if training.mixed_precision == "no":
        hints.append("set training.mixed_precision: bf16 (now no)")
    if isinstance(config, Config) and config.tuning.trains_base:
        hints.append(
            f"set tuning.method: lora (now {config.tuning.method}), or training.optimizer: adamw_8bit (now "
            f"{training.optimizer})"
        )
    if config.data.resolution is None or config.data.resolution > 512:
        hints.append(f"lower data.resolution (now {config.data.resolution or 'that of the model'})")
    return f"In this run: {'; '.join(hints)}" if hints else "All settings are small already: take a larger machine"
