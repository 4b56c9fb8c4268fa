"""Pick-a-Pic columns: two unordered images and a label for each; and the layout shared by all formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.data.row import BAD_LABEL, NO_LABEL, TIE

PROMPT = ("caption", "prompt", "original_prompt", "text")
USER = {"user": ("user", "user_id"), "user_embed": ("user_embed",)}


@dataclass(frozen=True)
class Layout:
    """Which column plays which part. Fields of `None` are absent from these data."""

    format: str
    prompt: str
    images: tuple[str, str]  # in the order of scores and labels
    labels: tuple[str | None, str | None] = (None, None)  # (None, None): the first image is the chosen one
    has_label: str | None = None
    uids: tuple[str, ...] = ()
    scores: tuple[str, str] | None = None
    terms: Mapping[str, str] = field(default_factory=dict)  # weight, margin, mask -> column
    user: str | None = None  # id of whoever preferred
    user_embed: str | None = None  # or their embedding itself, a list of numbers


# Part -> accepted column names, best first. A part in `OPTIONAL` may be missing.
PARTS: dict[str, tuple[str, ...]] = {
    "prompt": PROMPT,
    "image_0": ("jpg_0", "image_0", "image_path_0"),
    "image_1": ("jpg_1", "image_1", "image_path_1"),
    "label_0": ("label_0",),
    "label_1": ("label_1",),
    "has_label": ("has_label",),
    "uid_0": ("image_0_uid", "uid_0"),
    "uid_1": ("image_1_uid", "uid_1"),
    "score_0": ("score_0",),
    "score_1": ("score_1",),
    **USER,
}
OPTIONAL = frozenset({"label_1", "has_label", "uid_0", "uid_1", "score_0", "score_1", *USER})


def layout(found: Mapping[str, str]) -> Layout:
    """The layout for the columns `found` for each part (part -> column)."""
    uids = tuple(found[part] for part in ("uid_0", "uid_1") if part in found)
    scored = "score_0" in found and "score_1" in found
    return Layout(
        "pickapic",
        found["prompt"],
        (found["image_0"], found["image_1"]),
        labels=(found["label_0"], found.get("label_1")),
        has_label=found.get("has_label"),
        uids=uids if len(uids) == 2 else (),
        scores=(found["score_0"], found["score_1"]) if scored else None,
        user=found.get("user"),
        user_embed=found.get("user_embed"),
    )


def write_pickapic(file: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Writes rows of caption, jpg_0 and jpg_1 (encoded images), label_0, label_1, has_label, are_different and the
    images' uids as parquet. The file appears complete or not at all.

    columns: those that the rows have besides: score_0, score_1, weight, margin, mask, user, user_embed.
    """
    import pyarrow as pa

    from diffalign.data.formats.parquet import write_rows

    number, text = pa.float64(), pa.string()
    schema = {"caption": text, "jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": number, "label_1": number}
    schema |= {"has_label": pa.bool_(), "are_different": pa.bool_(), "image_0_uid": text, "image_1_uid": text}
    of_lists = {"mask": pa.list_(pa.list_(number)), "user": text, "user_embed": pa.list_(number)}
    write_rows(file, schema | {name: of_lists.get(name, number) for name in columns}, rows)


def judge(label_0: Any, label_1: Any, has_label: Any = True) -> int | tuple[str, str]:
    """Index of the chosen image, or (fault kind, reason). Labels are 1 / 0 for a choice and 0.5 / 0.5 for a tie.

    `label_1` may be None when the data have one label column; it is then 1 - label_0.
    """
    compared = _truth(has_label)
    if compared is None:
        return BAD_LABEL, f"has_label is {has_label!r:.80}; write true or false"
    if not compared:
        return NO_LABEL, "has_label is false: these images were not compared"
    first = _number(label_0)
    second = _number(label_1) if label_1 is not None or first is None else 1 - first
    if (first, second) in ((1.0, 0.0), (0.0, 1.0)):
        return 0 if first == 1 else 1
    if (first, second) == (0.5, 0.5):
        return TIE, "label_0 = label_1 = 0.5"
    return BAD_LABEL, (
        f"label_0 = {label_0!r:.80}, label_1 = {label_1!r:.80}; allowed are 1/0, 0/1 and, for a tie, 0.5/0.5"
    )


def _truth(value: Any) -> bool | None:
    """The truth value of a cell, None where it has none; an empty cell is false."""
    word = "" if isinstance(value, list | dict | bytes) else str(value).strip().lower()
    if word in ("true", "1", "1.0", "yes", "y", "t"):
        return True
    no = ("false", "0", "0.0", "no", "n", "f", "none", "null", "nan")
    return False if word in no or value == "" or str(value).isspace() else None


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
