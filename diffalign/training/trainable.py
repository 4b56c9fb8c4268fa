"""What the training loop trains: the state that all kinds of runs share, and the methods in which they differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from diffalign.config.schema import AnyConfig, Config
from diffalign.data.table.prompts import Table
from diffalign.errors import DiffalignError
from diffalign.models.adapters.save_load import load_tuned, save_tuned
from diffalign.models.loading.base import Base
from diffalign.models.loading.modules import UNet
from diffalign.models.policy.moving_reference import MovingReference
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.sharding import HostCopy, is_sharded, parts
from diffalign.objectives import Objective
from diffalign.rewards import Scorer
from diffalign.sources import Source
from diffalign.training.checkpoints.background import Background
from diffalign.training.checkpoints.identity import Identity
from diffalign.training.heldout.measure import FixedPoints
from diffalign.training.metrics import Meter
from diffalign.training.optim.optimizers import effective_batch
from diffalign.training.step import optimizer_step
from diffalign.types import PairBatch


class TrainingError(DiffalignError):
    """A run that cannot continue."""


@dataclass(kw_only=True)
class Trainable(ABC):
    """All parts of a run, built and placed on their devices.

    The loop, the callbacks and the checkpoints use only what is here. `Run` trains the UNet of a base model;
    `diffalign.contrib.step_aware` trains a preference model.
    """

    config: AnyConfig
    accelerator: Accelerator
    base: Base
    networks: Networks
    source: Source
    table: Table
    parameters: list[nn.Parameter]  # what the optimiser trains
    optimizer: torch.optim.Optimizer
    lr_scheduler: LRScheduler
    scaler: torch.amp.GradScaler  # disabled unless fp16
    ema: Any | None = None  # diffusers' EMAModel
    moving_reference: MovingReference | None = None  # a reference that follows the policy
    lr: float  # in force, after scale_lr
    identity: Identity = field(default_factory=dict)  # hashes of data and base, for the checkpoints
    callback_states: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of the callbacks, from the checkpoint that the run was restored from; by name."""
    restored_from: Path | None = None  # that checkpoint
    background: Background = field(default_factory=Background)  # where `training.async_checkpoints` are finished

    @property
    @abstractmethod
    def label(self) -> str:
        """What is trained, in a word or two, for the progress bar."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The trained module as the step calls it: wrapped where there are several processes."""

    @abstractmethod
    def step(self, batches: Iterator[PairBatch], meter: Meter) -> None:
        """One optimiser step, from the next micro-batches of the source; its metrics go to `meter`."""

    def ready_to_save(self) -> AbstractContextManager[Any]:
        """A block in which the main process calls `save_weights`; all processes enter it."""
        return nullcontext()

    @abstractmethod
    def save_weights(self, folder: Path) -> None:
        """Writes the trained weights in their final format."""

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Replaces the trained weights by those that `save_weights` wrote."""

    @abstractmethod
    def describe(self, start: int = 0) -> str:
        """The plan of the run from step `start` on, a line for each of its parts."""

    @abstractmethod
    def dry_run(self) -> str:
        """Takes one optimiser step on one pair and describes what it measured. It moves the weights of this run."""

    @abstractmethod
    def usage(self) -> str:
        """Where the final weights are, and which commands use them."""

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.config.output_dir)

    @property
    def pairs_per_step(self) -> int:
        """Pairs in one optimiser step, over all processes."""
        return effective_batch(self.config.training, self.accelerator.num_processes)

    def no_sync(self) -> AbstractContextManager[Any]:
        """A block whose backward passes leave the gradients of this process unsynchronised."""
        if is_sharded(self.module):  # gradients that wait for the last micro-batch would be whole ones
            return nullcontext()
        return self.accelerator.no_sync(self.module)

    def unet_forwards(self) -> int:
        """Images through the UNets since the run began, over all processes: both sides, inversions, samples."""
        own = self.networks.image_forwards
        return sum(gather_object([own])) if self.accelerator.num_processes > 1 else own

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The EMA weights in the trained module within the block; without an EMA nothing changes."""
        if self.ema is None:
            yield
            return
        self.ema.store(parts(self.parameters))
        self.ema.copy_to(parts(self.parameters))
        try:
            yield
        finally:
            self.ema.restore(parts(self.parameters))


@dataclass(kw_only=True)
class Run(Trainable):
    """A run that trains the UNet of a base model with an objective."""

    config: Config
    unet: UNet  # the policy, unwrapped
    objective: Objective
    reference_kind: str  # `Reference.kind`, or "none"
    heldout: FixedPoints | None = None  # pairs that are measured and not trained on
    faithfulness: Scorer | None = None  # `validation.faithfulness`, in the main process
    guard_prompts: Sequence[str] = ()  # whose images are measured with the held-out pairs
    host: HostCopy | None = None  # of a sharded policy, for its files

    @property
    def label(self) -> str:
        """The objective's name."""
        return self.objective.name

    @property
    def module(self) -> nn.Module:
        """The policy as it is called."""
        return self.networks.module

    def step(self, batches: Iterator[PairBatch], meter: Meter) -> None:
        """`training.step.optimizer_step`."""
        optimizer_step(self, batches, meter)

    @contextmanager
    def ready_to_save(self) -> Iterator[None]:
        """Joins the shards in the main process's memory, where the policy is sharded."""
        if self.host is not None:
            self.host.fill(self.parameters, self.accelerator.is_main_process)
        try:
            yield
        finally:
            if self.host is not None:
                self.host.empty()

    def save_weights(self, folder: Path) -> None:
        """A LoRA file, the file of user attention, or a folder `unet`, all in diffusers' layout."""
        save_tuned(self.unet if self.host is None else self.host.unet, folder, self.base.family)

    def load_weights(self, folder: Path) -> None:
        """Loads what `save_weights` wrote. Raises ModelError where it does not fit."""
        if self.host is None:
            load_tuned(self.unet, folder)
            return
        self.host.make_room()
        load_tuned(self.host.unet, folder)
        self.host.give(self.parameters)
        self.host.empty()

    def describe(self, start: int = 0) -> str:
        """`training.inspect.dry_run.describe_run`."""
        from diffalign.training.inspect.dry_run import describe_run

        return describe_run(self, start)

    def dry_run(self) -> str:
        """`training.inspect.dry_run.dry_run`."""
        from diffalign.training.inspect.dry_run import dry_run

        return dry_run(self)

    def usage(self) -> str:
        """The folder, and the option that takes it."""
        return f"weights in {self.output_dir}: pass this folder as --tuned to `diffalign generate` or `evaluate`"
