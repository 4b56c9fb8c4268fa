"""The levers of our step as data: a name, the settings it adds to those above it, and what was predicted for it.

A lever that lands in the package is one more line here. Predictions are from operator counts times usual rates of an
H100 (docs/performance.md), for SDXL at 1024 px; the measured column is filled by `python -m benchmarks.step --ladder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Lever:
    """One rung: settings of the config, by "section.key", added to all rungs above."""

    name: str
    overrides: Mapping[str, Any]
    predicted_full: float | None = None  # ms for a pair, SDXL 1024 px on an H100, all weights trained
    predicted_lora: float | None = None
    devices: tuple[str, ...] = field(default=("cpu", "cuda"))


LADDER = (
    Lever("latents cached, full checkpointing", {"model.gradient_checkpointing": True}, 187.0, 175.0),
    Lever("no checkpointing", {"model.gradient_checkpointing": False}, 151.0),
    Lever("attention by cuDNN", {"model.attention": "cudnn"}, 144.0, None, ("cuda",)),
)

# name -> values of one setting that are measured one after the other, all else equal
GROWTH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "pairs in a micro-batch": ("training.train_batch_size", (1, 2, 4, 8)),
    "accumulated micro-batches": ("training.gradient_accumulation_steps", (1, 2, 4)),
}


def rungs(device: str) -> list[tuple[Lever, dict[str, Any]]]:
    """Each lever that a device has, with the settings of all rungs up to it."""
    settings: dict[str, Any] = {}
    found = []
    for lever in LADDER:
        if device in lever.devices:
            settings = {**settings, **lever.overrides}
            found.append((lever, dict(settings)))
    return found
