"""The protocols of a source of pairs and of its settings, and the context that a source is built with.

A source is anything that gives micro-batches of pairs. Offline pairs are one (`data/loader/offline_pairs.py`); those
in this package make their pairs while training. Their settings are frozen dataclasses, found by name like objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.models.loading.modules import UNet
from diffalign.objectives.base import Compared, positive
from diffalign.types import PairBatch

if TYPE_CHECKING:
    from diffalign.data.loader.spec import LoaderSpec
    from diffalign.data.table.prompts import Table
    from diffalign.models.loading.encoder import Encoder
    from diffalign.models.loading.family import Family
    from diffalign.models.policy.networks import Networks
    from diffalign.models.policy.snapshot_reference import Former


class SourceError(DiffalignError):
    """A source cannot go on; the message names what was found and what to do."""


class Source(Protocol):
    """A stream of pairs, as the training loop uses it."""

    def batches(self, first_step: int = 0) -> Iterator[PairBatch]:
        """Micro-batches of this process from optimiser step `first_step` on, without end.

        `gradient_accumulation_steps` of them make one step.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What resuming after the last complete step needs besides that step's number: plain JSON values.

        The same in every process, so that the main process's is enough.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state; `batches` is called afterwards."""
        ...

    def take_metrics(self) -> dict[str, Tensor]:
        """Metrics since the last call: values by name, averaged over all of their entries."""
        ...


@dataclass(frozen=True)
class Context:
    """All that a source may use. Networks are called without grad; every process has a context of its own."""

    networks: Networks  # policy and reference, raw predictions
    unet: UNet  # the policy without wrappers: its weights as they are now
    former: Former | None  # the reference that `networks` calls, where a source with `own_reference` chooses it
    family: Family
    encoder: Encoder  # text encoders and VAE
    table: Table  # prompts with ids; `Winners`, which have an image as well, where `Settings.data` is winners
    spec: LoaderSpec  # seed, batch sizes and processes of the run, prompt dropout, null prompts
    wait: Callable[[], None]  # returns when every process has called it
    folder: Path  # of the source, inside the run's
    saved: Callable[[], list[dict[str, Any]]]  # states in the run's checkpoints: the files they need must stay
    latent_shape: tuple[int, int, int]  # c h w of a sampled image
    resolution: int  # pixels
    device: torch.device
    center_crop: bool = True  # of images that are read
    random_flip: bool = False

    @property
    def main(self) -> bool:
        """Whether this is the process that writes what all share."""
        return self.spec.processes.process_index == 0


class Settings(Protocol):
    """The settings of a source: a frozen dataclass, the `source` section of a config."""

    name: ClassVar[str]  # the name in configs
    paper: ClassVar[str]  # "Authors, title, arXiv id"
    data: ClassVar[Literal["prompts", "winners"]]  # what `data.path` must hold
    gives: ClassVar[Compared]  # what an objective must compare to use its pairs; images: any objective can
    own_reference: ClassVar[bool]  # the source decides what the reference is
    # A source may also have `same_in_objective` and `same_in_training`, each a ClassVar[dict[str, str]]: fields that
    # must equal the objective's, or those of the `training` section.

    def build(self, context: Context) -> Source:
        """The source of a run."""
        ...

    def small(self) -> Settings:
        """The same source at the least cost, for the dry run (`diffalign check`)."""
        ...


class CandidateSettings(Protocol):
    """The settings that `best_of` and `online_pairs` share; see there."""

    @property
    def scorer(self) -> str: ...
    @property
    def prompts_per_round(self) -> int: ...
    @property
    def samples_per_prompt(self) -> int: ...
    @property
    def sampling_steps(self) -> int: ...
    @property
    def guidance_scale(self) -> float: ...
    @property
    def generation_batch_size(self) -> int: ...
    @property
    def keep_rounds(self) -> bool: ...


def candidates_valid(settings: CandidateSettings) -> None:
    """Raises DiffalignError for settings with which nothing can be sampled or compared."""
    at_least("samples_per_prompt", settings.samples_per_prompt, 2)
    at_least("prompts_per_round", settings.prompts_per_round, 1)
    at_least("sampling_steps", settings.sampling_steps, 1)
    at_least("generation_batch_size", settings.generation_batch_size, 1)
    positive("guidance_scale", settings.guidance_scale)


def at_least(name: str, value: int, least: int) -> None:
    """Raises DiffalignError for a count below what makes sense."""
    if value < least:
        raise DiffalignError(f"{name} = {value}: must be at least {least}")
