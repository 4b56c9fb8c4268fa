"""What a run that does not fit holds, and the settings that would save most, each counted as the run itself is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from diffalign.config.schema import Config, parse_config
from diffalign.models.loading.base import outline_base
from diffalign.training.distributed.launcher_settings import shards
from diffalign.training.inspect.dry_run import described, size_of
from diffalign.training.inspect.memory_plan import Counted, plan_memory
from diffalign.training.settle import settled

log = logging.getLogger(__name__)

NAMED = 3  # settings in a message
LEAST = 0.01  # share of the whole that a change must save to be named


@dataclass(frozen=True)
class Change:
    """Settings by their keys, and what they cost or change."""

    settings: dict[str, Any]
    effect: str

    def __str__(self) -> str:
        return " ".join(f"{key}={'null' if value is None else value}" for key, value in self.settings.items())


def memory_advice(config: Config, device: torch.device) -> str | None:
    """For a message; None where it cannot be counted, e.g. for a base that was given as an open pipeline."""
    try:
        family = outline_base(config.model.spec).family
        config = settled(config, device, family.name)
        known: dict[str, Counted] = {}
        held = plan_memory(config, known)
    except Exception as error:  # the run has failed already: advice must not hide why
        log.debug("the memory of this run was not counted", exc_info=error)
        return None
    total = sum(held.values())
    needs = [(change, _need(config, change, known)) for change in _changes(config, family.default_resolution)]
    saved = [(total - need, change) for change, need in needs if need is not None and total - need >= LEAST * total]
    best = sorted(saved, key=lambda each: each[0], reverse=True)[:NAMED]
    lines = [f"  {change}: {size_of(less)} less ({change.effect})" for less, change in best]
    advice = "\nWhat would save most, by the same count:\n" + "\n".join(lines) if lines else ""
    return f"As counted from its config, this run needs {described(held)}{advice}"


def _need(config: Config, change: Change, known: dict[str, Counted]) -> float | None:
    """Bytes with a change; None where it is not allowed with the other settings, or cannot be counted."""
    tree = config.resolved()
    for key, value in change.settings.items():
        section, name = key.split(".")
        if key == "tuning.method":
            tree["tuning"] = {}
        tree[section][name] = value
    try:
        changed = parse_config(tree)
        return sum(plan_memory(changed, known).values()) if isinstance(changed, Config) else None
    except Exception as error:  # also what no check foresees; the run's own error matters more
        log.debug("%s was not counted", change, exc_info=error)
        return None


def _changes(config: Config, resolution: int) -> Iterator[Change]:
    """Changes that could save memory; each differs from the config. resolution: the model's own."""
    training, data, model = config.training, config.data, config.model
    if model.gradient_checkpointing != "full":
        yield Change({"model.gradient_checkpointing": "full"}, "the same result; a step costs one more forward")
    if (pairs := training.train_batch_size) > 1:
        same = "the same result" if data.aspect_buckets is None else "in a new run: another order of the pairs"
        steps = {"training.gradient_accumulation_steps": pairs * training.gradient_accumulation_steps}
        yield Change({"training.train_batch_size": 1, **steps}, f"{same}; more calls")
    if (getattr(config.objective, "points_per_forward", 1) or 2) > 1:
        yield Change({"objective.points_per_forward": 1}, "the same result; more calls")
    if data.cache_dir is None and config.source is None:
        yield Change(
            {"data.cache_dir": "cache/pairs", **_no_images(config)}, "VAE and text encoders are needed only before"
        )
    elif data.cache_dir is not None and config.validation.samples:
        yield Change(_no_images(config), "VAE and text encoders are needed only before")
    if training.mixed_precision == "no":
        yield Change({"training.mixed_precision": "bf16"}, "other rounding")
    if training.ema_decay is not None:
        yield Change({"training.ema_decay": None}, "the last weights are the final ones")
    if config.tuning.trains_base:
        yield Change({"tuning.method": "lora"}, "trains adapters in place of all weights")
    if getattr(config.tuning, "quantize_base", "") is None and not shards():
        yield Change({"tuning.quantize_base": "nf4"}, "the base's transformer blocks in 4 bits; slower")
    for optimizer in () if shards() else ("adamw_8bit", "adamw_8bit_bf16"):  # FSDP2 refuses them
        if optimizer != training.optimizer and not training.optimizer.startswith("adamw_8bit"):
            weights = ", weights in bfloat16" if optimizer.endswith("bf16") else ""
            yield Change({"training.optimizer": optimizer}, f"states in 8 bits{weights}")
    if (data.resolution or resolution) > 512:
        yield Change({"data.resolution": 512}, "smaller images")


def _no_images(config: Config) -> dict[str, Any]:
    """What a run changes that samples images and no longer will."""
    off: dict[str, Any] = {"validation.prompts": []} if config.validation.prompts else {}
    named = ("least_diversity", "faithfulness", "least_faithfulness")
    return off | {f"validation.{name}": None for name in named if getattr(config.validation, name) is not None}
