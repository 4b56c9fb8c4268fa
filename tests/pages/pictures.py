"""Pictures of one colour for pages, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from diffalign.pages.comparison_page import Column


@dataclass(frozen=True)
class Painted:
    """A picture of one grey level."""

    prompt: str
    seed: int
    grey: int

    def open(self) -> Image.Image:
        return Image.new("RGB", (8, 8), (self.grey,) * 3)


def column(name: str, prompts: Sequence[str], grey: int, scores: Sequence[Sequence[float]] = ()) -> Column:
    """A column whose i-th picture has the level grey + i."""
    return Column(name, [Painted(prompt, i, grey + i) for i, prompt in enumerate(prompts)], scores)
