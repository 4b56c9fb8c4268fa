"""What recordings beside an encode cache (trajectories, the reference's errors) have in common.

A shard notes how many images went through the networks to make it. A run counts that for every shard that it uses,
whether it made it, found it, or made it before it was killed: `unet_forwards` is then the same for all of these.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from diffalign.data.cache.shards import manifest_text, read_content, write_manifest
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.row import DataError

log = logging.getLogger(__name__)

FORWARDS = "forwards"  # name of the tensor that holds the count


class Counts(Protocol):
    """What counts the images that go through the networks; `models.Networks` does."""

    image_forwards: int


def agreed_plan(folder: Path, key: Mapping[str, Any], plan: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The plan of the recording in a folder, begun with `plan` if there is none; and whether its shards have hashes.

    Raises DataError where the folder holds a recording of something else, or a damaged manifest.
    """
    if read_content(folder) is None:
        write_manifest(folder, manifest_text({"key": dict(key), "plan": plan}))
    found = read_content(folder)
    if found is None or found[0].get("key") != json.loads(json.dumps(key)) or "plan" not in found[0]:
        raise DataError(f"{folder} contains a recording of something else; delete it to have it made again")
    return found[0]["plan"], found[1]


def spent(before: int, counts: Counts | None) -> dict[str, Tensor]:
    """What a shard notes of its cost: the images that went through the networks since there were `before`."""
    return {} if counts is None else {FORWARDS: torch.tensor([counts.image_forwards - before])}


def count_found(file: Path, counts: Counts | None) -> None:
    """Adds what making a shard took to the run's count; one of an older version does not say it."""
    if counts is None:
        return
    with safe_open(file, "pt") as shard:
        if FORWARDS in shard.keys():  # noqa: SIM118
            counts.image_forwards += int(shard.get_tensor(FORWARDS))
        else:
            log.warning(
                "%s is from an older version and does not record its cost: unet_forwards does not include it", file
            )


def no_number(what: str, source: OfflinePairs, index: int) -> DataError:
    """The error for a recording that must not be kept."""
    return DataError(
        f"the {what} of pair {source.table.ids[index]} ({source.table.where(index)}) is not finite and "
        "is not stored. Remove that row if it is the only one; otherwise set training.mixed_precision "
        "to bf16 or no, or use another base"
    )
