"""Text embeddings of the prompts in a batch: each prompt encoded once, one entry for both sides of a pair."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from diffalign.data.encoder import Encoder
from diffalign.data.finite import require_text
from diffalign.types import Conditioning

TEXT_MEMO = 256  # prompts whose embeddings stay on the encoder's device (SDXL: 0.6 MB each)


class TextMemo:
    """Embeddings of unique prompts, float32 on the encoder's device; those used last are in memory."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._memory: OrderedDict[str, tuple[Tensor, Tensor | None]] = OrderedDict()

    def __call__(self, prompts: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        """Embeddings [pair tokens dim] and, where the family has it, the pooled ones [pair dim]."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._memory]
        for prompt in new:
            # One a call: a batch of another size rounds otherwise, and what is new depends on where the run began.
            text = self.encoder.prompts([prompt])
            if text.prompt_embeds.device.type != "cuda":  # there it would wait, once for each new prompt
                require_text((text.prompt_embeds, text.pooled), [prompt])
            pooled = None if text.pooled is None else text.pooled[0].float()
            self._memory[prompt] = (text.prompt_embeds[0].float(), pooled)
        found = [self._memory[prompt] for prompt in prompts]
        for prompt in prompts:
            self._memory.move_to_end(prompt)
        while len(self._memory) > TEXT_MEMO:
            self._memory.popitem(last=False)
        pools = [pooled for _, pooled in found if pooled is not None]
        return torch.stack([embeds for embeds, _ in found]), torch.stack(pools) if pools else None


def for_sides(text: tuple[Tensor, Tensor | None], sides: int = 2) -> Conditioning:
    """Conditioning of pairs from the embeddings of their prompts: all sides have one prompt, a view over their axis."""
    embeds, pooled = text
    return Conditioning(
        embeds.expand(sides, *embeds.shape), None if pooled is None else pooled.expand(sides, *pooled.shape)
    )


def for_pairs(text: tuple[Tensor, Tensor | None], pairs: int) -> tuple[Tensor, Tensor | None]:
    """The embeddings of one prompt, [1 tokens dim] and [1 dim], for so many pairs: a view."""
    embeds, pooled = text
    return embeds.expand(pairs, -1, -1), None if pooled is None else pooled.expand(pairs, -1)
