"""ImageReward (arXiv 2304.05977): BLIP reads the prompt and the image by cross-attention; a head rates the first token.

    score = (head(BLIP(image, prompt)[CLS]) - .16717) / 1.0333

so that the unit is a standard deviation of the rewards that the authors measured. The head is the aesthetic
predictor's: five linear layers, no activation between them. Weights: `ImageReward.pt` of THUDM/ImageReward (a state
dict, read without running code), or the same tensors as .safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffalign.rewards.aesthetic import linear_head
from diffalign.rewards.base import ScorerError, check_finite, check_lengths
from diffalign.rewards.clip import hub_file, load_or_explain, load_state
from diffalign.rewards.preprocess import centre_crop, clip_pixels
from diffalign.rewards.released.blip import Heads, split_blip, text_model, vision_model

REPO, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
TOKENS = 35  # of a prompt, longer ones are cut
MEAN, STD = 0.16717362830052426, 1.0333394966054072
BATCH = 32


class ImageReward:
    """About -2.5 to 2 on ordinary images; `path` is the file, a folder with it (and a tokenizer), or a Hub id."""

    name = "imagereward"
    span = (-2.5, 2.0)
    tie = 0.01  # a hundredth of a standard deviation

    def __init__(self, path: str = REPO, *, tokenizer: str = TOKENIZER, device: str = "cpu") -> None:
        file = hub_file(path, FILE, "model.safetensors")
        self.network = blip_reward(load_state(file), str(file)).to(device)
        self.tokenizer = blip_tokenizer(path, tokenizer)
        self.device = device

    @torch.no_grad()
    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """The standardised reward, [n]. Raises ScorerError naming the prompt of a score that is not finite."""
        check_lengths(self.name, images, prompts)
        parts = [
            self._some(images[start : start + BATCH], prompts[start : start + BATCH])
            for start in range(0, len(images), BATCH)
        ]
        return check_finite(self.name, torch.cat(parts) if parts else torch.empty(0), prompts)

    def _some(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        pixels = clip_pixels(images, self.network.image_size, centre_crop).to(self.device)
        rewards = self.network(pixels, tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device))
        return rewards.cpu()


class BlipReward(nn.Module):
    """Pixels and tokens to standardised rewards."""

    def __init__(self, vision: Any, text: Any, head: nn.Module) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.image_size: int = vision.config.image_size

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Rewards [n] of pixels "n 3 size size", tokens and mask "n length"."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=image, is_decoder=False)
        return (self.head(read.last_hidden_state[:, 0]).squeeze(-1) - MEAN) / STD


def blip_reward(state: dict[str, Tensor], where: str, heads: Heads | None = None) -> BlipReward:
    """The network from the released state dict. Raises ScorerError or ModelError naming what does not fit."""
    heads, parts = heads or Heads(), split_blip(state)
    try:
        vision, text = vision_model(parts.vision, heads.vision), text_model(parts.text, heads.text)
    except KeyError as error:
        raise ScorerError(f"{where} is not ImageReward's state dict: tensor {error} is missing") from error
    return BlipReward(vision, text, linear_head(parts.head, where, "ImageReward's head"))


def blip_tokenizer(path: str, default: str) -> Any:
    """BERT's tokenizer with BLIP's two further tokens, from the folder `path` if it has one, else from `default`."""
    from transformers import BertTokenizer

    own = any((Path(path) / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    source = path if own else default
    tokenizer: Any = load_or_explain(source, lambda: BertTokenizer.from_pretrained(source))
    tokenizer.add_tokens([token for token in ("[DEC]", "[ENC]") if token not in tokenizer.get_vocab()], True)
    return tokenizer
