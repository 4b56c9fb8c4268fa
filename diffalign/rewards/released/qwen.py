"""Qwen2-VL as HPSv3 uses it: patches of an image, a text with one place for its score, and the last hidden state there.

Positions of all tokens are 0, 1, 2, ... in a row, also of the image's. Qwen2-VL itself gives an image's tokens a grid
of positions (M-RoPE); HPSv3 was trained and is released with a forward that leaves them out (transformers 4.45.2,
`position_ids` None below `Qwen2VLModel`), and other positions give other scores.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.rewards.base import ScorerError
from diffalign.rewards.preprocess import CLIP_MEAN, CLIP_STD

PIXELS = 256 * 28 * 28  # of every image after resizing, at most
PATCH, MERGE, FRAMES = 14, 2, 2  # pixels a patch, patches a token on each axis, repetitions of an image as a film
WIDEST = 200  # ratio of the sides


class QwenReward(nn.Module):
    """Tokens and patches to the head's two numbers, mean and log-scale of the score."""

    def __init__(self, vision: Any, text: Any, head: nn.Module) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    def forward(self, tokens: Tensor, mask: Tensor, image: tuple[Tensor, Tensor], places: tuple[int, int]) -> Tensor:
        """[n, 2] in the head's dtype.

        tokens, mask: "n length", padded on the right. image: patches "p d" of all images and their grids "n 3".
        places: the ids of the tokens that an image fills, and of the one that is scored.
        """
        patches, grids = image
        embedded = self.text.embed_tokens(tokens)
        seen = self.vision(patches.to(embedded.dtype), grid_thw=grids).pooler_output
        embedded = embedded.masked_scatter((tokens == places[0])[..., None], seen.to(embedded.dtype))
        hidden = self.text(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
        return self.head(hidden[tokens == places[1]].to(next(self.head.parameters()).dtype))


def sides(height: int, width: int, pixels: int = PIXELS, unit: int = PATCH * MERGE) -> tuple[int, int]:
    """Height and width to resize to: multiples of `unit` with about `pixels` in all. Raises ScorerError for a strip."""
    if max(height, width) > WIDEST * min(height, width):
        raise ScorerError(
            f"hpsv3 got an image of {width} x {height} pixels; the ratio of its sides is at most {WIDEST}"
        )
    tall, wide = (max(unit, round(side / unit) * unit) for side in (height, width))
    if tall * wide > pixels:
        shrink = math.sqrt(height * width / pixels)
        return math.floor(height / shrink / unit) * unit or unit, math.floor(width / shrink / unit) * unit or unit
    if tall * wide < pixels:
        grow = math.sqrt(pixels / (height * width))
        return math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
    return tall, wide


def patches_of(image: Image.Image) -> tuple[Tensor, Tensor]:
    """Patches "p (channel frame y x)" in the order of merged blocks, and the grid [frames, rows, columns]."""
    tall, wide = sides(image.height, image.width)
    resized = np.asarray(image.convert("RGB").resize((wide, tall), Image.Resampling.BICUBIC))
    pixels = (torch.from_numpy(resized.copy()).float() / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    rows, columns = tall // PATCH, wide // PATCH
    split = pixels.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    ordered = split.permute(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, 1, PATCH, PATCH)
    return ordered.expand(-1, -1, FRAMES, -1, -1).flatten(1), torch.tensor([1, rows, columns])


def split_qwen(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of image encoder, text model and head, without prefix; of transformers 4.45 and of 4.52 and later.

    Left out: `lm_head`, which predicts words. Raises ScorerError for a tensor that has no place.
    """
    vision: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("model.")
        if name.startswith("visual."):
            vision[name.removeprefix("visual.")] = value
        elif key.startswith("rm_head."):
            head[key.removeprefix("rm_head.")] = value
        elif key.startswith("model."):
            text[name.removeprefix("language_model.")] = value
        elif key != "lm_head.weight":
            raise ScorerError(f"the weights of hpsv3 have a tensor '{key}' that has no place")
    return vision, text, head
