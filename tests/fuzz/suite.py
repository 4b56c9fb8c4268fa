"""All kinds of bad input, and how many of each the test suite tries."""

from __future__ import annotations

from collections.abc import Iterable

from tests.fuzz import kinds, kinds_cli, kinds_data, kinds_files
from tests.fuzz.harness import Kind

KINDS: dict[str, tuple[Kind, int]] = {
    "config": (kinds.config, 300),
    "override": (kinds.override, 150),
    "schedule": (kinds.schedule, 200),
    "prompts": (kinds.prompts, 200),
    "users": (kinds.users, 120),
    "scores": (kinds.scores, 150),
    "manifest": (kinds.manifest, 150),
    "checkpoint": (kinds.checkpoint, 60),
    "table": (kinds_data.table, 350),
    "image": (kinds_data.image, 250),
    "lora": (kinds_files.lora, 40),
    "full": (kinds_files.full, 40),
    "base": (kinds_files.base, 30),
    "command": (kinds_cli.command, 150),
}


def sized(total: int, names: Iterable[str] = tuple(KINDS)) -> dict[str, tuple[Kind, int]]:
    """The named kinds in the suite's proportions, `total` cases together."""
    chosen = {name: KINDS[name] for name in names}
    whole = sum(count for _, count in chosen.values())
    return {name: (kind, -(-count * total // whole)) for name, (kind, count) in chosen.items()}
