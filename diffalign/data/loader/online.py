"""Images decoded in loader workers at every visit, and encoded in the main process: no preparation of the data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.data.buckets.sizes import Shapes, square
from diffalign.data.encoder import Encoder
from diffalign.data.finite import LatentsGuard
from diffalign.data.loader.loaded import NULL_PROMPT, Loaded, sample_latents
from diffalign.data.loader.text import TextMemo, for_sides
from diffalign.data.table.pairs import PairTable
from diffalign.data.transforms import flips, prepare_pair


@dataclass(frozen=True)
class Online:
    """Encode at every visit; VAE and text encoders stay resident."""

    encoder: Encoder
    resolution: int  # pixels
    center_crop: bool = True
    random_flip: bool = False
    buckets: Shapes | None = None  # None: every pair is a square of `resolution`

    @property
    def shapes(self) -> Shapes:
        """The size of each pair's images."""
        return square(self.resolution) if self.buckets is None else self.buckets

    @property
    def factor(self) -> int:
        """Pixels for a place of the latents, in each direction."""
        with torch.no_grad():
            return factor_of(self.encoder, self.shapes)


def factor_of(encoder: Encoder, shapes: Shapes) -> int:
    """Pixels for a place of an encoder's latents, in each direction."""
    width, height = shapes.sizes[0]
    return width // int(encoder.moments(torch.zeros(1, 3, height, width)).shape[-1])


class Pixels:
    """Images decoded and cropped at every visit."""

    def __init__(self, table: PairTable, online: Online) -> None:
        self.table, self.shapes = table, online.shapes
        self.center_crop, self.random_flip = online.center_crop, online.random_flip

    def load(self, index: int, key: int, draw: int, prompt: str | None) -> Loaded:
        pixels, geometry = prepare_pair(
            self.table[index],
            self.shapes[index],
            key=key,
            center_crop=self.center_crop,
            random_flip=self.random_flip,
        )
        return Loaded(torch.tensor([key], dtype=torch.int64), geometry[:, None], pixels[:, None])

    def flip(self, name: str, key: int, draw: int) -> bool:
        return self.random_flip and flips(key)


class Encoding:
    """Pixels and prompts as latents and text embeddings."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.text, self._guard = encoder, TextMemo(encoder), LatentsGuard()

    def __call__(self, loaded: Loaded) -> Loaded:
        """Raises DataError for latents or embeddings that are not finite."""
        assert loaded.pixels is not None, "Pixels loads them"
        pairs = len(loaded.keys)
        with torch.no_grad():
            moments = self.encoder.moments(loaded.pixels.transpose(0, 1).flatten(0, 1))  # the sides of a pair in turn
            self._guard(moments.reshape(pairs, -1), [f"pair {name}" for name in loaded.ids])
            sides = len(loaded.pixels)
            latents = sample_latents(moments.unflatten(0, (pairs, sides)).transpose(0, 1), loaded.keys)
            return replace(loaded, pixels=None, latents=latents, cond=for_sides(self.text(loaded.prompts), sides))

    def null_text(self) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the null prompt, [1 tokens dim] and [1 dim]."""
        return self.text((NULL_PROMPT,))
