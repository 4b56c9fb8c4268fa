"""The optimisations of our step as data: name, the settings that each adds to those above it, and its predicted effect.

A new optimisation is one more line here. Predictions combine operator counts with usual rates of an H100
(docs/performance.md), for SDXL at 1024 px. `python -m benchmarks.step --ladder` measures them. Channels-last and
compiled blocks are predicted together; the prediction stands at the second of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KEPT_ERRORS: dict[str, Any] = {"data.draws_per_pair": 4, "data.cache_reference_errors": True}


@dataclass(frozen=True)
class Lever:
    """One rung: settings of the config, by "section.key", added to all rungs above."""

    name: str
    overrides: Mapping[str, Any]
    predicted_full: float | None = None  # ms for a pair, SDXL 1024 px on an H100, all weights trained
    predicted_lora: float | None = None
    devices: tuple[str, ...] = field(default=("cpu", "cuda"))
    tunings: tuple[str, ...] = field(default=("lora", "full"))
    precisions: tuple[str, ...] = field(default=("no", "bf16", "fp16"))
    package: str | None = None  # that it needs


def ladder(pairs: int) -> tuple[Lever, ...]:
    """The rungs for micro-batches of so many pairs."""
    return (
        Lever("latents cached, full checkpointing", {"model.gradient_checkpointing": "full"}, 187.0, 175.0),
        Lever("selective checkpointing", {"model.gradient_checkpointing": "selective"}, 151.0),
        Lever("no checkpointing", {"model.gradient_checkpointing": "none"}, 151.0),
        Lever("attention by cuDNN", {"model.attention": "cudnn"}, 144.0, None, ("cuda",), precisions=("bf16", "fp16")),
        Lever("channels last", {"model.channels_last": True}),
        Lever("fused kernels", {"model.fused_kernels": True}, devices=("cuda",), package="triton"),
        Lever("compiled blocks", {"model.compile": True, "model.fused_kernels": False}, 125.0, 102.0),
        Lever("two micro-batches a step", {"training.gradient_accumulation_steps": 2}),
        Lever("one reference forward for both", {"training.reference_batch_size": 2 * pairs}),
        Lever("reference errors kept", {"training.reference_batch_size": None, **KEPT_ERRORS}, 110.0, 73.0),
        Lever(
            "AdamW with 8-bit state",
            {"training.optimizer": "adamw_8bit"},
            devices=("cuda",),
            tunings=("full",),
            package="torchao",
        ),
        Lever(
            "bf16 weights, stochastic rounding",
            {"training.optimizer": "adamw_bf16"},
            tunings=("full",),
            precisions=("bf16",),
        ),
        Lever(
            "the same, moments of 8 bits",
            {"training.optimizer": "adamw_8bit_bf16"},
            tunings=("full",),
            precisions=("bf16",),
        ),
    )


def growing(resolution: int) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """name -> values of one setting that are measured one after the other, all else equal; up to so many pixels."""
    return {
        "pairs in a micro-batch": ("training.train_batch_size", (1, 2, 4, 8)),
        "accumulated micro-batches": ("training.gradient_accumulation_steps", (1, 2, 4)),
        "pixels": ("data.resolution", (resolution // 2, resolution * 3 // 4, resolution)),
    }


def rungs(
    device: str, pairs: int = 8, tuning: str = "lora", precision: str = "no"
) -> list[tuple[Lever, dict[str, Any]]]:
    """Each lever that a run on this machine has, with the settings of all rungs up to it."""
    settings: dict[str, Any] = {}
    found = []
    for lever in ladder(pairs):
        there = lever.package is None or importlib.util.find_spec(lever.package) is not None
        if there and device in lever.devices and tuning in lever.tunings and precision in lever.precisions:
            settings = {**settings, **lever.overrides}
            found.append((lever, dict(settings)))
    return found
