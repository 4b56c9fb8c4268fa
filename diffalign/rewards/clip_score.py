"""CLIP score: 100 · cos(image, prompt), how well an image shows its prompt.

A measure of faithfulness rather than of taste: use it as `faithfulness` beside a preference scorer.
Differs from arXiv 2104.08718 (2.5 · max(cos, 0)): the factor is 100, and negative cosines are not clipped, so that
differences stay meaningful.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image
from torch import Tensor

from diffalign.rewards.base import check_lengths
from diffalign.rewards.clip import load_clip


class ClipScore:
    """About 15 to 35 on ordinary images."""

    name = "clip"
    span = (10.0, 40.0)

    def __init__(self, path: str = "openai/clip-vit-large-patch14", *, device: str = "cpu") -> None:
        self.clip = load_clip(path, path, device)
        self.embed_images = self.clip.embed_images

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """100 · cos, [n]."""
        check_lengths(self.name, images, prompts)
        return 100 * self.clip.cosine(images, prompts)
