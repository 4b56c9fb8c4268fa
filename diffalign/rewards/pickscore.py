"""PickScore (arXiv 2305.01569): CLIP-H tuned on Pick-a-Pic votes; score = exp(logit_scale) · cos(image, prompt).

Two images of one prompt: sigmoid(difference) is the model's probability that people prefer the first.
The published repository is a plain CLIPModel. Needs about 4 GB of weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image
from torch import Tensor

from diffalign.rewards.base import check_lengths
from diffalign.rewards.clip import load_clip
from diffalign.rewards.table import PICKSCORE


class PickScore:
    """About 17 to 24 on ordinary images; differences of .5 are large."""

    name = "pickscore"
    span = (11.543526500463486, 28.201571106910706)  # 100 times the range that SmPO's release has of its cosine

    def __init__(
        self,
        path: str = PICKSCORE,
        *,
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str = "cpu",
    ) -> None:
        self.clip = load_clip(path, tokenizer, device)
        self.embed_images = self.clip.embed_images

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """exp(logit_scale) · cos, [n]."""
        check_lengths(self.name, images, prompts)
        return self.clip.logit_scale.cpu() * self.clip.cosine(images, prompts)
