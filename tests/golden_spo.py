"""The cases of `tests/golden/spo.json` as tensors (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffalign import NoiseSchedule

FILE = Path(__file__).parent / "golden" / "spo.json"


def spo_case(name: str) -> dict[str, Any]:
    """A case by name, every tensor in it made."""
    (case,) = (c for c in json.loads(FILE.read_text())["cases"] if c["name"] == name)
    return _tensors(case)


def spo_parts(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(params, inputs, outputs) of a case."""
    case = spo_case(name)
    return case["params"], case["inputs"], case["outputs"]


def spo_schedule(case: dict[str, Any]) -> NoiseSchedule:
    """The schedule of a case: diffusers' float32 table cast to float64, as in the recording."""
    return NoiseSchedule.from_diffusers(diffusers.DDIMScheduler(**case["params"]["scheduler"]))


def _tensors(node: Any) -> Any:
    if isinstance(node, list):
        return [_tensors(part) for part in node]
    if not isinstance(node, dict):
        return node
    if node.keys() == {"shape", "dtype", "data"}:
        return torch.tensor(node["data"], dtype=getattr(torch, node["dtype"])).reshape(node["shape"])
    return {key: _tensors(value) for key, value in node.items()}
