"""Our training step as a contender: a run that the package builds from a config, one optimiser step a call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffalign.config.schema import Config, parse_config
from diffalign.training.build import Run, build
from diffalign.training.metrics import JsonLines, Meter
from diffalign.training.processes import make_accelerator
from diffalign.training.step import optimizer_step

Overrides = Mapping[str, Any]  # "section.key" -> value


def make_config(folder: Path, parquet: Path, out: Path, overrides: Overrides) -> Config:
    """The config of a cached LoRA run with some settings changed. Raises ConfigError for settings that are none."""
    tree: dict[str, Any] = {
        "output_dir": str(out),
        "model": {"pretrained_model_name_or_path": str(folder)},
        "tuning": {"method": "lora"},
        "objective": {"name": "dpo"},
        "data": {"path": str(parquet), "cache_dir": str(out / "cache")},
        "training": {"max_train_steps": 1_000_000, "report_to": "none"},
    }
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        if key:
            tree.setdefault(section, {})[key] = value
        else:
            tree[section] = value
    return parse_config(tree, where="benchmark")


def on_random_weights(folder: Path, data: Path, resolution: int, out: Path) -> list[str]:
    """Overrides that give any packaged config a model folder and pairs that are here, and a folder of its own."""
    return [
        f"output_dir={out}",
        f"model.pretrained_model_name_or_path={folder}",
        "model.pretrained_vae_model_name_or_path=null",
        "model.variant=null",
        f"data.path={data}",
        f"data.resolution={resolution}",
        "training.gradient_accumulation_steps=2",
        "training.report_to=none",
    ]


class Ours:
    """A run of the package; `step` is what its loop does for each optimiser step, logging included."""

    def __init__(self, config: Config) -> None:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=False)  # other contenders have another precision
        self.run: Run = build(config, make_accelerator(config))
        self._batches = self.run.source.batches()
        self._meter = Meter()
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        self._lines = JsonLines(Path(config.output_dir) / "metrics.jsonl", 0)
        self.taken = 0
        self.logged: list[dict[str, float]] = []

    def step(self) -> None:
        """The next pairs, from the cache to the update; every `logging_steps` the metrics are read and written."""
        optimizer_step(self.run, self._batches, self._meter)
        self._meter.add(self.run.source.take_metrics())
        self.taken += 1
        if self.taken % self.run.config.training.logging_steps == 0:
            values = self._meter.means()
            self._lines.write(self.taken, values)
            self.logged.append(values)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.run.accelerator.device
