"""What a scorer is: pictures and prompts in, one number per picture out.

Anything with a `name` and a `score` is a scorer; nothing has to be inherited. A scorer may also have

    tie              float: two scores closer than this count as equal (default 0.01, see `tie_of`)
    embed_images     images -> unit vectors "n d": lets the diversity guard measure in feature space
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from PIL.Image import Image
from torch import Tensor

DEFAULT_TIE = 0.01


class ScorerError(ValueError):
    """A scorer is unknown, cannot be loaded, or was asked for something it cannot score."""


@runtime_checkable
class Scorer(Protocol):
    """A judge of pictures. Higher is better; the unit is the scorer's own."""

    name: str

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Float [n]: image i judged against prompt i."""
        ...


def tie_of(scorer: Scorer) -> float:
    """The difference below which two scores of this scorer count as equal, in its own unit."""
    return float(getattr(scorer, "tie", DEFAULT_TIE))


def check_lengths(name: str, images: Sequence[Image], prompts: Sequence[str]) -> None:
    """Raise ScorerError unless there is exactly one prompt per image."""
    if len(images) != len(prompts):
        raise ScorerError(
            f"scorer '{name}' got {len(images)} images and {len(prompts)} prompts; "
            "pass one prompt per image (repeat the prompt for several seeds)"
        )
