"""docs/architecture.md: every function that it names exists, and a run calls them in the page's order."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

PAGE = (Path(__file__).parent.parent / "docs/architecture.md").read_text(encoding="utf-8")
NAME = re.compile(r"`(diffalign(?:\.\w+)+)`")
NAMES = list(dict.fromkeys(NAME.findall(PAGE)))


def found(name: str) -> Any:
    """The object behind a dotted name."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            value: Any = import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            value = getattr(value, part)
        return value
    raise AssertionError(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_exists(name: str) -> None:
    assert found(name) is not None


def test_a_run_calls_what_each_part_names_in_its_order(make_config: Any, tiny_sd: str, tmp_path: Path) -> None:
    """By first call; a class stands for its `__call__` or `__init__`."""
    from diffalign.training.run import run_training
    from diffalign.world import pairs_path

    of_run = PAGE.partition("## 1.")[2].partition("`diffalign.evaluation")[0]
    walk = [name for name in dict.fromkeys(NAME.findall(of_run)) if not name.endswith("PairBatch")]
    codes = {}
    for name in walk:
        value = found(name)
        if isinstance(value, type):
            value = vars(value).get("__call__", value.__init__)
        codes[inspect.unwrap(value).__code__] = name
    calls: list[str] = []

    def follow(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in codes and codes[frame.f_code] not in calls:
            calls.append(codes[frame.f_code])

    changes = {
        "data.path": str(pairs_path()),
        "data.max_pairs": 2,
        "data.cache_dir": str(tmp_path / "cache"),
        "tuning.method": "full",
        "training.max_train_steps": 1,
        "training.checkpointing_steps": 1,
    }
    config = make_config(tiny_sd, changes)
    sys.setprofile(follow)
    try:
        run_training(config)
    finally:
        sys.setprofile(None)
    assert sorted(set(walk) - set(calls)) == []
    parts = [[name for name in NAME.findall(part) if name in calls] for part in of_run.split("\n## ")]
    first = [min(map(calls.index, part)) for part in parts if part]
    assert first == sorted(first)
