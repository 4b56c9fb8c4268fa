"""Preference columns (`prompt`, `chosen`, `rejected`): the first image is the chosen one, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffalign.data.formats.pickapic import PROMPT, USER, Layout

PARTS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", *(name for name in PROMPT if name != "prompt")),
    "chosen": ("chosen", "chosen_image", "image_chosen", "chosen_path"),
    "rejected": ("rejected", "rejected_image", "image_rejected", "rejected_path"),
    "uid": ("uid", "pair_id"),
    "chosen_score": ("chosen_score", "score_chosen"),
    "rejected_score": ("rejected_score", "score_rejected"),
    **USER,
}
OPTIONAL = frozenset({"uid", "chosen_score", "rejected_score", *USER})


def layout(found: Mapping[str, str]) -> Layout:
    """The layout for the columns `found` for each part (part -> column)."""
    scored = "chosen_score" in found and "rejected_score" in found
    return Layout(
        "preference",
        found["prompt"],
        (found["chosen"], found["rejected"]),
        uids=(found["uid"],) if "uid" in found else (),
        scores=(found["chosen_score"], found["rejected_score"]) if scored else None,
        user=found.get("user"),
        user_embed=found.get("user_embed"),
    )


def write_preferences(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows of prompt, chosen and rejected (encoded images) and chosen_score and rejected_score as parquet.

    A few rows are in memory at a time; the file appears complete or not at all.
    """
    import pyarrow as pa

    from diffalign.data.formats.parquet import write_rows

    columns = {"prompt": pa.string(), "chosen": pa.binary(), "rejected": pa.binary()}
    write_rows(file, {**columns, "chosen_score": pa.float64(), "rejected_score": pa.float64()}, rows)
