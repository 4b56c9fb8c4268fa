"""Long prompts: several chunks of tokens, each encoded alone and between its own BOS and EOS, and joined again.

A text encoder of CLIP takes 77 positions: BOS, 75 tokens, EOS. A prompt of more tokens is divided after every 75th,
each chunk is padded as a prompt is (behind its EOS), and a prompt with fewer chunks than the others gets empty ones.
The embeddings of the chunks are joined along the tokens in one of two layouts:

    kohya   BOS of the first chunk, the 75 tokens of each, the last position of the last: 75·n + 2   (sd-scripts)
    webui   all 77 positions of each: 77·n                                                (A1111, Forge, ComfyUI)

The pooled embedding of SDXL is that of the first chunk, as in all of these programs. Left out: A1111's rule that moves
the words behind a late comma to the next chunk, ComfyUI's that keeps the tokens of a word together, and BREAK.
sd-scripts takes a token that is also the padding token ("!" in SDXL's second tokenizer) at the edge of a chunk for
padding; here it is a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def chunk_rows(tokenizer: Any, prompts: Sequence[str], chunks: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask "prompt·chunk token": all chunks of the first prompt, then those of the next.

    What is beyond the last chunk is cut off.
    """
    length = tokenizer.model_max_length
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows, masks = [], []
    for tokens in tokens_of(tokenizer, prompts):
        for first in range(0, chunks * (length - 2), length - 2):
            row = [bos, *tokens[first : first + length - 2], eos]
            rows.append(row + [pad] * (length - len(row)))
            masks.append([1] * len(row) + [0] * (length - len(row)))
    return torch.tensor(rows), torch.tensor(masks)


def tokens_of(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of each prompt, all of them, without BOS and EOS."""
    # verbose=False: the tokenizer's own warning of long prompts repeats once per process and names no prompt
    found: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids
    return found


def joined(hidden: Tensor, chunks: int, layout: str) -> Tensor:
    """Embeddings "prompt token dim" from those of the chunks, "prompt·chunk token dim"."""
    if chunks == 1:
        return hidden
    parts = hidden.unflatten(0, (-1, chunks))
    if layout == "webui":
        return parts.flatten(1, 2)
    inner = parts[:, :, 1:-1].flatten(1, 2)
    return torch.cat([parts[:, 0, :1], inner, parts[:, -1, -1:]], dim=1)
