"""Preference columns (`prompt`, `chosen`, `rejected`): the first image is the chosen one, by name."""

from __future__ import annotations

from collections.abc import Mapping

from diffalign.data.pickapic import PROMPT, USER, Layout
from diffalign.data.terms import TERMS

PARTS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", *(name for name in PROMPT if name != "prompt")),
    "chosen": ("chosen", "chosen_image", "image_chosen", "chosen_path"),
    "rejected": ("rejected", "rejected_image", "image_rejected", "rejected_path"),
    "uid": ("uid", "pair_id"),
    "chosen_score": ("chosen_score", "score_chosen"),
    "rejected_score": ("rejected_score", "score_rejected"),
    **{part: (part,) for part in TERMS},
    **USER,
}
OPTIONAL = frozenset({"uid", "chosen_score", "rejected_score", *TERMS, *USER})


def layout(found: Mapping[str, str]) -> Layout:
    """The layout for the columns `found` for each part (part -> column)."""
    scored = "chosen_score" in found and "rejected_score" in found
    return Layout(
        "preference",
        found["prompt"],
        (found["chosen"], found["rejected"]),
        uids=(found["uid"],) if "uid" in found else (),
        scores=(found["chosen_score"], found["rejected_score"]) if scored else None,
        terms={part: found[part] for part in TERMS if part in found},
        user=found.get("user"),
        user_embed=found.get("user_embed"),
    )
