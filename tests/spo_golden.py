"""The cases of tests/golden/spo.json as tensors; tests/golden/README.md says who computed them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def _cases() -> dict[str, Any]:
    cases = json.loads((Path(__file__).parent / "golden/spo.json").read_text())["cases"]
    return {each["name"]: each for each in cases}


def spo_case(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(params, inputs, outputs) of a case."""
    case = _cases()[name]
    return case["params"], _tensors(case["inputs"]), _tensors(case["outputs"])


def _tensors(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node.keys() >= {"shape", "dtype", "data"}:
        return torch.tensor(node["data"], dtype=getattr(torch, node["dtype"])).reshape(node["shape"])
    return {key: _tensors(value) for key, value in node.items()}
