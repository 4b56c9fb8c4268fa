"""A run from Python: the same objects and the same path as `diffalign train CONFIG`.

    from diffalign import DiffusionDPO, LoRA, Trainer, TrainingArguments

    trainer = Trainer(
        model="stabilityai/stable-diffusion-xl-base-1.0",
        objective=DiffusionDPO(beta=5000.0),
        train_dataset="my/pairs",
        tuning=LoRA(rank=16),
        args=TrainingArguments(output_dir="runs/mine", max_train_steps=500, learning_rate=1e-5),
    )
    trainer.train()

Every setting has the name it has in a config, and `Trainer.config` is that config: it is saved with the run, and
`diffalign train runs/mine/config.yaml` repeats a run whose model and data are given by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffalign.config.health_section import HealthSection
from diffalign.config.schema import Config, parse_config, settings_of
from diffalign.config.sections import DataSection, ModelSection, TrainingSection, ValidationSection
from diffalign.config.strict_yaml import ConfigError
from diffalign.data.formats.arrow import object_columns
from diffalign.data.formats.columns import Columns
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.errors import DiffalignError
from diffalign.models.adapters.core_methods import FullFineTuning as FullFineTuning
from diffalign.models.adapters.core_methods import LoRA as LoRA
from diffalign.models.adapters.methods import TuningMethod
from diffalign.models.loading.base import Base
from diffalign.models.loading.from_pipeline import base_of_pipeline
from diffalign.models.policy.sharding import is_sharded
from diffalign.objectives import Objective
from diffalign.training.callbacks.base import Callback, TrainingState, check_callbacks
from diffalign.training.callbacks.run_page import print_summary
from diffalign.training.run import run_training
from diffalign.training.trainable import Trainable

if TYPE_CHECKING:
    from diffalign.evaluation.manifest import GeneratedImage
    from diffalign.evaluation.report import Result
    from diffalign.evaluation.sampling import Sampling
    from diffalign.evaluation.scoring import Scoring
    from diffalign.rewards import Scorer

GIVEN_DATA = "an open data set"  # in place of a path where the data were given as an object


class TrainingArguments(TrainingSection):
    """How long, how fast, how precise and where to: the `training` section of a config with the run's own settings."""

    output_dir: str
    overwrite_output_dir: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Pairs:
    """Pairs that `load_pairs` opened, with the settings that a run reads them by."""

    table: PairTable
    section: DataSection

    def __len__(self) -> int:
        return len(self.table)


def load_pairs(source: Any, *, lists: bool = False, **settings: Any) -> Pairs:
    """Usable preference pairs, with how a run uses them.

    source: a file, folder or Hub id in any layout of docs/data.md, a data set of `datasets` or torch, or a list of rows
        such as `{"prompt": "a cat", "chosen": "a.png", "rejected": "b.png"}` (paths, bytes or PIL images). A stream
        is read to its end into memory; `stream.take(n)` bounds it.
    lists: keep rankings of several images as whole lists, for an objective that compares lists.
    settings: fields of a config's `data` section: split, columns, max_pairs, resolution, center_crop, random_flip,
        cache_dir, ...

    `.table.problems` names every row that is left out. Raises DataError where no pair can be used, and ConfigError
    for a setting that does not exist.
    """
    named = isinstance(source, str | Path)
    section = settings_of(DataSection, {"path": str(source) if named else GIVEN_DATA, **settings}, "load_pairs")
    stored: str | Path | Columns = source if named else object_columns(source)
    table = open_pairs(stored, replace(section.spec, lists=lists))
    table.require_usable()
    return Pairs(table, section)


class Trainer:
    """One tuning run.

    model: Hub id, diffusers folder, single-file checkpoint, or an open StableDiffusion(XL)Pipeline, whose UNet is
        then tuned in place.
    objective: an objective, its name, or `package.module:Class`.
    train_dataset: what `load_pairs` takes, or what it returns. With `source`, prompts or winners by path.
    args: where to, how long, how fast.
    tuning: `LoRA()`, `FullFineTuning()` or another `TuningMethod`.
    source: settings of a source that makes its pairs while training (`diffalign.sources`); None: the pairs given.
    resolution: pixels; None: as given to `load_pairs`, else the model family's own.
    model_settings, validation, health: fields of the config's sections of these names.
    eval_dataset: pairs that are measured and not trained on (docs/heldout.md); as train_dataset. `validation` has the
        settings, and `validation={"pairs": 0.1}` takes a share of train_dataset instead.
    callbacks: called between steps, with the step and its metrics (`training/callbacks/base.py`).

    Raises ConfigError with every fault at once, before anything is loaded.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective | str,
        train_dataset: Any,
        args: TrainingArguments,
        *,
        tuning: TuningMethod | None = None,
        source: Any = None,
        resolution: int | None = None,
        model_settings: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        health: Mapping[str, Any] | None = None,
        eval_dataset: Any = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.base: Base | None = None
        if not isinstance(model, str | Path):
            self.base = base_of_pipeline(model)
        self.table: PairTable | None = None
        data = self._data(train_dataset, made_while_training=source is not None)
        validation = self._with_heldout(validation or {}, eval_dataset)
        if resolution is not None:
            data = settings_of(
                DataSection, {**data.model_dump(exclude_unset=True), "resolution": resolution}, "Trainer"
            )
        name = self.base.source if self.base is not None else str(model)
        own = {"output_dir", "overwrite_output_dir", "seed"}
        tree = {
            **args.model_dump(include=own),
            "model": settings_of(
                ModelSection, {"pretrained_model_name_or_path": name, **(model_settings or {})}, "model"
            ),
            "tuning": LoRA() if tuning is None else tuning,
            "objective": {"name": objective} if isinstance(objective, str) else objective,
            "source": source,
            "data": data,
            "training": TrainingSection(**args.model_dump(exclude=own, exclude_unset=True)),
            "validation": settings_of(ValidationSection, validation, "validation"),
            "health": settings_of(HealthSection, health or {}, "health"),
        }
        config = parse_config(tree, "Trainer")
        assert isinstance(config, Config)
        self.config = config
        self.callbacks = check_callbacks(callbacks)
        self.run: Trainable | None = None

    def _data(self, given: Any, *, made_while_training: bool) -> DataSection:
        if made_while_training:
            if not isinstance(given, str | Path):
                raise ConfigError(
                    "Trainer: a source takes its prompts or winners from a file; give train_dataset a path"
                )
            return settings_of(DataSection, {"path": str(given)}, "Trainer")
        if isinstance(given, str | Path):
            return settings_of(DataSection, {"path": str(given)}, "Trainer")
        pairs = given if isinstance(given, Pairs) else load_pairs(given)
        self.table = pairs.table
        return pairs.section

    def _with_heldout(self, validation: Mapping[str, Any], given: Any) -> Mapping[str, Any]:
        """The settings of `validation` with held-out pairs; those that were given as an object go with the table."""
        self.heldout: PairTable | None = None
        if given is None:
            return validation
        if validation.get("pairs") is not None:
            raise ConfigError("Trainer: eval_dataset and validation.pairs are both given; remove one of them")
        if isinstance(given, str | Path):
            return {**validation, "pairs": str(given)}
        if self.table is None:
            raise ConfigError(
                "Trainer: eval_dataset is an object and train_dataset is not; give both by path, or load both with "
                "load_pairs"
            )
        self.heldout = (given if isinstance(given, Pairs) else load_pairs(given)).table
        return {**validation, "pairs": GIVEN_DATA}

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.config.output_dir)

    def train(self) -> dict[str, float]:
        """Runs to the end, from the configured checkpoint if there is one; returns the last logged metrics.

        Prints the plan first, and at the end what happened and where the page of the run is.
        """
        callbacks = [*self.callbacks, _Remember(self)]
        table = copy(self.table)
        if table is not None:
            table.heldout = self.heldout
        last = run_training(self.config, table=table, base=self.base, callbacks=callbacks)
        print_summary(self.config)
        return last

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] = (0,),
        *,
        out_dir: str | Path | None = None,
        sampling: Sampling | None = None,
    ) -> list[GeneratedImage]:
        """Images of the tuned model in `out_dir`, by default `output_dir`/pictures; see `diffalign.generate`."""
        from diffalign.evaluation.generate import generate

        folder = self.output_dir / "pictures" if out_dir is None else out_dir
        model, tuned = self._model_path(), self._finished()
        return generate(model, prompts, seeds, out_dir=folder, tuned=tuned, sampling=sampling)

    def evaluate(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int] = (0, 1, 2, 3),
        *,
        scorers: Sequence[str | Scorer] | Scoring,
        out_dir: str | Path | None = None,
        sampling: Sampling | None = None,
    ) -> Result:
        """The tuned model beside its base on the same prompts and seeds; see `diffalign.evaluate`.

        `print(result.table())` shows gains, wins and guards. `out_dir` is by default `output_dir`/evaluation.
        """
        from diffalign.evaluation.evaluate import evaluate

        folder = self.output_dir / "evaluation" if out_dir is None else out_dir
        model, tuned = self._model_path(), {self.config.objective.name: self._finished()}
        return evaluate(model, tuned, prompts, seeds, scorers=scorers, out_dir=folder, sampling=sampling)

    def save_model(self, folder: str | Path) -> Path:
        """Writes the policy's weights as they are (the EMA's where there is one) in diffusers' layout.

        Every process calls it, and the main one writes. Raises DiffalignError before there are weights, and after a
        sharded run has ended.
        """
        if self.run is None:
            raise DiffalignError("save_model: nothing was trained yet; call train() first")
        if is_sharded(self.run.module) and not torch.distributed.is_initialized():
            raise DiffalignError(
                f"save_model: each process has a part of the weights, and the group of processes has ended; the final "
                f"weights are in {self.output_dir}"
            )
        with self.run.averaged_weights(), self.run.ready_to_save():
            if self.run.accelerator.is_main_process:
                self.run.save_weights(Path(folder))
        return Path(folder)

    def _model_path(self) -> str:
        if self.base is not None:
            raise DiffalignError(
                "the model was given as an open pipeline, which holds the tuned weights now: generate with the "
                "pipeline itself, or give Trainer the path of the model"
            )
        return str(self.config.model.pretrained_model_name_or_path)

    def _finished(self) -> Path:
        from diffalign.models.adapters.save_load import find_tuned

        return find_tuned(self.output_dir).path if self.output_dir.exists() else self._none()

    def _none(self) -> Path:
        raise DiffalignError(f"{self.output_dir} does not exist: nothing was trained yet; call train() first")


class _Remember(Callback):
    """Gives a trainer its run."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, state: TrainingState) -> None:
        self.trainer.run = state.run
